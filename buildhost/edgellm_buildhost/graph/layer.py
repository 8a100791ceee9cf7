"""One decoder layer as a graph of its own, whose weights are inputs: calibration runs a model layer by layer.

Layers that attend alike have equal graphs, so one session serves them all, and a model of any depth runs in
the memory of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture, layer_tensor
from edgellm_buildhost.graph.decoder import write_layer
from edgellm_buildhost.graph.dialect import Table
from edgellm_buildhost.graph.onnxruntime import IR_VERSION, OnnxRuntimeDialect
from edgellm_buildhost.graph.values import FedValues
from edgellm_buildhost.quantization.layer import FloatLayer, Linear, Point

_POINTS = {
    "qkv": Point.ATTENTION,
    "attention_out": Point.ATTENTION_OUTPUT,
    "gate_up": Point.FFN,
    "down": Point.FFN_OUTPUT,
}
OUTPUTS = ("hidden", *Point, "keys", "values")
"""What a layer graph gives, in the order of its outputs."""


@dataclass(frozen=True)
class LayerGraph:
    """A layer as a serialized graph, and the weights to feed it with.

    Inputs, in this order: `hidden` float32 [1, tokens, hidden_size]; `past_len` and `query_len` int32 [1];
    caches of keys and values, float32 [1, kv_heads, tokens, head_dim], whose content is not read while
    `past_len` is 0; then `weights`. Outputs, in the order of `OUTPUTS`: the state behind the layer; the
    values at each `Point`, float32 [1, tokens, width]; keys (with their rotary position) and values, float32
    [1, kv_heads, tokens, head_dim].
    """

    model: bytes
    weights: tuple[NDArray[Any], ...]


def layer_graph(architecture: Architecture, layer: int, floats: FloatLayer, tokens: int) -> LayerGraph:
    """The graph of a layer for windows of at most `tokens`."""
    fed = FedValues()
    # Rotary positions beyond the window are of no use here.
    dialect = _LayerDialect(replace(architecture, context_length=tokens), fed)
    hidden = ir.val("hidden", dtype=ir.DataType.FLOAT, shape=[1, "tokens", architecture.hidden_size])
    update, total = write_layer(_OneLayer(layer, floats), dialect, architecture, layer, (None, hidden))
    if update is None:
        raise ValueError("a layer adds something")
    graph = dialect.finished(layer, hidden, update, total)
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="edgellm"))
    weights = tuple(fed.fed.values())
    # What a graph is made of refers to itself in circles: the weights of several layers would wait for a
    # collection.
    fed.fed.clear()
    return LayerGraph(model.SerializeToString(), weights)


class _LayerDialect(OnnxRuntimeDialect):
    """Keeps what enters each linear."""

    def __init__(self, architecture: Architecture, fed: FedValues) -> None:
        super().__init__(architecture, fed, accuracy_level=0)
        self._fed = fed
        self._points: dict[Point, ir.Value] = {}

    def linear(
        self, x: ir.Value, weight: Linear, name: str, bias: NDArray[np.float32] | None = None
    ) -> ir.Value:
        self._points[_POINTS[name.rpartition(".")[2]]] = x
        return super().linear(x, weight, name, bias)

    def finished(self, layer: int, hidden: ir.Value, update: ir.Value, total: ir.Value) -> ir.Graph:
        """All of it as a graph."""
        caches = [f"kv_{kind}_{layer}" for kind in ("key", "value")]
        inputs = [hidden, *(self.inputs[name] for name in ("past_len", "query_len", *caches))]
        after = self.add(update, total, "hidden_out")
        self.output(after, "hidden_out", [1, "tokens", self._architecture.hidden_size])
        for point, value in self._points.items():
            self.output(value, point.value, [1, "tokens", "width"])
        names = ("hidden_out", *(point.value for point in Point), *(f"{name}_out" for name in caches))
        return self.graph([*inputs, *self._fed.inputs], [self.outputs[name] for name in names])


class _OneLayer:
    """The weights of one layer as the decoder asks for them."""

    def __init__(self, layer: int, floats: FloatLayer) -> None:
        self._prefix = layer_tensor(layer, "", "").rstrip(".") + "."
        self._floats = floats

    def linear(self, layer: int, part: str) -> Linear:
        del layer
        return self._floats.linears[part]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._floats.vectors[name.removeprefix(self._prefix)]

    def table(self, name: str) -> Table:
        raise KeyError(name)
