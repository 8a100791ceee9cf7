"""Scales of an INT8 KV cache: the engine reads a text with a float cache, and its largest values are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.progress import StageProgress
from edgellm_buildhost.quantization.grid import KvScales
from edgellm_buildhost.runner import Runner

_TOKENS = 2048
_PIECES = 16
_CHUNK_TOKENS = 128
_TOP_CODE = 127
# Room for values larger than any that the text gave; what exceeds it is cut off. Mean divergence from a float
# cache (KL, nats) for SmolLM2-135M INT8, on prose, on mixed languages and code, and on random tokens:
#     1.0: 0.011 0.010 0.056    1.1: 0.011 0.008 0.035    1.25: 0.010 0.008 0.019    1.5: 0.011 0.008 0.017
_MARGIN = 1.5
# A channel that the text never moved gets this part of the largest one's scale.
_LEAST = 1e-3


def calibrate(
    graph: Path,
    architecture: Architecture,
    windows: NDArray[np.int64],
    progress: StageProgress,
    *,
    first: int | None = None,
) -> KvScales:
    """The scales that fit what `graph`, with float caches, computes for up to 2,048 tokens of `windows`.

    `windows` is int64 [windows, tokens]; `first` a token to begin with. `progress` is told tokens done, and
    all. Raises BuildError if the model computes values that are not finite.
    """
    ids = _one_sequence(windows, min(_TOKENS, architecture.context_length), first)
    engine = Runner(graph, len(ids))
    for start in range(0, len(ids), _CHUNK_TOKENS):
        chunk = ids[start : start + _CHUNK_TOKENS]
        engine.feed(chunk[None], start)
        progress(start + len(chunk), len(ids))
    layers, kinds = range(architecture.layers), ("key", "value")
    keys, values = (np.stack([_scale(engine.caches, kind, layer) for layer in layers]) for kind in kinds)
    return KvScales(keys, values)


def _one_sequence(windows: NDArray[np.int64], tokens: int, first: int | None) -> NDArray[np.int64]:
    """The beginnings of all windows, one behind the other, so that many positions are seen too.

    A first token gathers attention and has keys like no other: let it be one that texts do begin with.
    """
    pieces = windows[: min(_PIECES, tokens)]
    joined = pieces[:, : max(1, tokens // len(pieces))].reshape(-1)
    begin = [] if first is None else [first]
    return np.array([*begin, *joined][:tokens], np.int64)


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
