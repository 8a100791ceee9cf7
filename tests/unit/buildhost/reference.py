"""A decoder in plain numpy, and a runner of the built graph: what the two say must agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgellm_buildhost.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Architecture,
)
from edgellm_buildhost.architecture import layer_tensor as part
from edgellm_buildhost.calibration.walk import FloatModel
from edgellm_buildhost.checkpoint import Checkpoint
from edgellm_buildhost.graph.minima import fold_minima
from edgellm_buildhost.graph.sources import table_group_size
from edgellm_buildhost.quantization.grid import Grid, QuantizedTensor, quantize
from edgellm_buildhost.quantization.layer import Method
from edgellm_buildhost.recipe import QuantName, Request, recipe_for

Floats = NDArray[np.float32]


def rounded_weights(checkpoint: Checkpoint, quant: QuantName | Method) -> dict[str, Floats]:
    """The weights that an engine of this method stands for, dense."""
    shape, model = checkpoint.architecture, FloatModel(checkpoint)
    method = recipe_for(Request(quant), shape).method if isinstance(quant, QuantName) else quant
    weights = {name: checkpoint.tensor(name) for name in (EMBEDDING, FINAL_NORM)}
    if not shape.tied_embedding:
        weights[HEAD] = checkpoint.tensor(HEAD)
    for name in weights.keys() - {FINAL_NORM}:
        # Tables are 16-bit floats between the two halves of a build.
        halves = weights[name].astype(np.float16).astype(np.float32)
        weights[name] = quantize(halves, 8, table_group_size(shape), Grid.SYMMETRIC).dequantize()
    for layer in range(shape.layers):
        done = method.quantize(shape, layer, model.layer(layer), None)
        weights |= {part(layer, name): effective(linear) for name, linear in done.linears.items()}
        weights |= {f"model.layers.{layer}.{name}": vector for name, vector in done.vectors.items()}
    return weights


def effective(weight: QuantizedTensor) -> Floats:
    """The dense matrix of a quantized one, with its minima rounded as they are stored."""
    if weight.minima is None:
        return weight.dequantize()
    folded = fold_minima(weight).dequantize()
    rest = folded[:, weight.columns : weight.columns + weight.groups]
    return folded[:, : weight.columns] + np.repeat(rest, weight.group_size, axis=1)


def reference_logits(shape: Architecture, weights: Mapping[str, Floats], ids: NDArray[np.int64]) -> Floats:
    """Logits `[tokens, vocab]` of one sequence, all at once and without a cache."""
    hidden = weights[EMBEDDING][ids].astype(np.float64)
    angles = np.outer(np.arange(len(ids)), np.asarray(shape.attention[0].inverse_frequencies))
    for layer in range(shape.layers):
        x = _norm(hidden, weights[part(layer, "input_layernorm")], shape.rms_epsilon)
        q, k, v = (x @ weights[part(layer, f"self_attn.{name}_proj")].T for name in "qkv")
        attended = _attention(
            _rotate(_heads(q, shape), angles), _rotate(_heads(k, shape), angles), _heads(v, shape)
        )
        hidden = hidden + attended @ weights[part(layer, "self_attn.o_proj")].T
        x = _norm(hidden, weights[part(layer, "post_attention_layernorm")], shape.rms_epsilon)
        gate, up = (x @ weights[part(layer, f"mlp.{name}_proj")].T for name in ("gate", "up"))
        hidden = hidden + (gate / (1.0 + np.exp(-gate)) * up) @ weights[part(layer, "mlp.down_proj")].T
    head = weights.get(HEAD, weights[EMBEDDING])
    return np.asarray(_norm(hidden, weights[FINAL_NORM], shape.rms_epsilon) @ head.T, dtype=np.float32)


class Engine:
    """A built graph with the caches of some rows, driven as the device drives it: caches bound in place."""

    def __init__(
        self,
        directory: Path,
        *,
        graph: str = "model.onnx",
        rows: int = 1,
        capacity: int = 64,
        threads: int = 1,
        unwritten: int = 127,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(directory / graph), options, ["CPUExecutionProvider"])
        inputs = {item.name: item for item in self.session.get_inputs()}
        kv_heads, head_dim = inputs["kv_key_0"].shape[1], inputs["kv_key_0"].shape[3]
        names = [name for name in inputs if name.startswith("kv_")]
        # What was never written must never be read: not a number there would spread to the logits.
        floats = inputs["kv_key_0"].type == "tensor(float)"
        dtype, fill = (np.float32, np.nan) if floats else (np.int8, unwritten)
        self.caches: dict[str, NDArray[Any]] = {
            name: np.full((rows, kv_heads, capacity, head_dim), fill, dtype) for name in names
        }

    def step(
        self,
        ids: NDArray[np.int64],
        past: NDArray[np.int32],
        wanted: NDArray[np.int64] | None = None,
        query: NDArray[np.int32] | None = None,
    ) -> Floats:
        """Feed `ids` [rows, tokens] behind `past` [rows]; logits of all positions, or of those wanted.

        `query` [rows]: how many tokens of a row are no padding, None where all are.
        """
        wanted = np.arange(ids.size) if wanted is None else wanted
        feeds = {
            "input_ids": ids,
            "past_len": past.astype(np.int32),
            "query_len": np.full(len(ids), ids.shape[1], np.int32) if query is None else query,
            "logit_index": wanted.astype(np.int64),
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self.caches.items():
            cell = (cache.dtype, cache.shape, cache.ctypes.data)
            binding.bind_input(name, "cpu", 0, *cell)
            binding.bind_output(f"{name}_out", "cpu", 0, *cell)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return np.asarray(binding.copy_outputs_to_cpu()[self._place("logits")])

    def _place(self, name: str) -> int:
        bound = [f"{cache}_out" for cache in self.caches] + ["logits"]
        return bound.index(name)


def _norm(x: NDArray[np.float64], gain: Floats, epsilon: float) -> NDArray[np.float64]:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * gain)


def _heads(x: NDArray[np.float64], shape: Architecture) -> NDArray[np.float64]:
    return x.reshape(len(x), -1, shape.head_dim).swapaxes(0, 1)


def _rotate(x: NDArray[np.float64], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _attention(q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray((weights @ v).swapaxes(0, 1).reshape(q.shape[1], -1))
