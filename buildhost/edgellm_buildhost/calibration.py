"""Scales of an INT8 KV cache: the engine reads a text with a float cache, and its largest values are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgellm_buildhost.checkpoint.base import Architecture, Checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantize import KvScales

_TOKENS = 2048
_PIECES = 16
_CHUNK_TOKENS = 128
_CHARACTERS_PER_TOKEN = 8  # more than any text has on average
_TOP_CODE = 127
# Room for values larger than any that the text gave; what exceeds it is cut off. Mean divergence from a float
# cache (KL, nats) for SmolLM2-135M INT8, on prose, on mixed languages and code, and on random tokens:
#     1.0: 0.011 0.010 0.056    1.1: 0.011 0.008 0.035    1.25: 0.010 0.008 0.019    1.5: 0.011 0.008 0.017
_MARGIN = 1.5
# A channel that the text never moved gets this part of the largest one's scale.
_LEAST = 1e-3


def calibrate(
    graph: Path, checkpoint: Checkpoint, text: str, progress: Callable[[int, int], None]
) -> KvScales:
    """The scales that fit what `graph`, with float caches, computes for up to 2,048 tokens of `text`.

    `progress` is told tokens done, and all. Raises BuildError if the text is empty or the model computes
    values that are not finite.
    """
    ids = _sample(checkpoint, text)
    caches = _caches(graph, checkpoint.architecture, ids, progress)
    layers = range(checkpoint.architecture.layers)
    keys, values = (np.stack([_scale(caches, kind, layer) for layer in layers]) for kind in ("key", "value"))
    return KvScales(keys, values)


def default_text() -> str:
    """The language reference that comes with every Python: prose, code, grammar and tables; no network.

    Another version of Python has another text, so engines calibrated with it may differ in their last digits.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 - 700 kB that only a calibration needs

    return "\n".join(topics[name] for name in sorted(topics))


def _sample(checkpoint: Checkpoint, text: str) -> NDArray[np.int64]:
    """Pieces from all over the text, one behind the other, so that many positions are seen too."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json.decode())
    wanted = min(_TOKENS, checkpoint.architecture.context_length)
    length, span = max(1, wanted // _PIECES), -(-len(text) // _PIECES)
    pieces = [text[i * span :][: min(span, length * _CHARACTERS_PER_TOKEN)] for i in range(_PIECES)]
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    ids = [token for piece in encoded for token in piece.ids[:length]]
    if not ids:
        raise BuildError("the calibration text is empty", "give a text like those that the engine will read")
    # A first token gathers attention and has keys like no other: let it be one that texts do begin with.
    first = [] if checkpoint.tokenizer.bos_id is None else [checkpoint.tokenizer.bos_id]
    return np.array((first + ids)[:wanted], np.int64)


def _caches(
    graph: Path, shape: Architecture, ids: NDArray[np.int64], progress: Callable[[int, int], None]
) -> dict[str, NDArray[np.float32]]:
    """Keys and values of all tokens by the names of the graph's inputs, [1, kv_heads, tokens, head_dim]."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs() if item.name.startswith("kv_")]
    caches = {name: np.zeros((1, shape.kv_heads, len(ids), shape.head_dim), np.float32) for name in names}
    for start in range(0, len(ids), _CHUNK_TOKENS):
        chunk = ids[None, start : start + _CHUNK_TOKENS]
        feeds = {
            "input_ids": np.ascontiguousarray(chunk),
            "past_len": np.array([start], np.int32),
            "query_len": np.array([chunk.shape[1]], np.int32),
            "logit_index": np.zeros(0, np.int64),
        }
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, cache in caches.items():
            binding.bind_input(name, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            binding.bind_output(f"{name}_out", "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        progress(start + chunk.shape[1], len(ids))
    return caches


def _scale(caches: dict[str, NDArray[np.float32]], kind: str, layer: int) -> NDArray[np.float32]:
    """Of one layer, [kv_heads, head_dim]."""
    largest = np.abs(caches[f"kv_{kind}_{layer}"][0]).max(axis=1)
    if not np.isfinite(largest).all():
        raise BuildError(
            f"layer {layer} computes {kind}s that are not finite for the calibration text",
            "build with a float32 KV cache, or check the checkpoint: its values overflow float32",
        )
    least = max(float(largest.max()) * _LEAST, float(np.finfo(np.float32).tiny) * _TOP_CODE)
    return np.asarray(np.maximum(largest, least) * (_MARGIN / _TOP_CODE), np.float32)
