"""The dialect of ONNX Runtime: contrib operations that fuse what its kernels do best, on versions 1.23 to
1.32.

One MatMulNBits for query, key and value, one for gate and up; the residual sum inside the norm; rotary
positions and the cache inside GroupQueryAttention; the embedding's bytes read again by a tied head.

What GroupQueryAttention takes grew with the versions: 12 inputs in 1.23, 16 from 1.28 at the latest to 1.31,
and a 17th, the number of tokens that are not padding, in 1.32. A node with more inputs than a version knows
is refused, so one graph cannot serve both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from edgellm_buildhost.checkpoint.base import Architecture
from edgellm_buildhost.graph.weights import WeightShards
from edgellm_buildhost.minima import fold_minima, sum_columns
from edgellm_buildhost.quantize import KvScales, QuantizedTensor, pack_codes

RUNTIME_REQUIRES = ">=1.23,<1.33"
RUNTIME_REQUIRES_INT8_KV = ">=1.32,<1.33"
_CONTRIB = "com.microsoft"
_OPSET = 21
_IR_VERSION = 10  # the newest that 1.23 reads is 11; 10 has all that is used here
_K_SCALE, _V_SCALE, _QUERY_SEQLENS = 12, 13, 16  # indices of inputs of GroupQueryAttention


@dataclass(frozen=True)
class _Layout:
    """What MatMulNBits needs to know of a matrix beside its bytes."""

    rows: int
    columns: int
    bits: int
    group_size: int

    @classmethod
    def of(cls, weight: QuantizedTensor) -> _Layout:
        return cls(weight.rows, weight.columns, weight.bits, weight.group_size)


@dataclass(frozen=True)
class _SharedTable:
    """The embedding's bytes as a tied head reads them."""

    codes: ir.ExternalTensor
    scales: ir.Value
    layout: _Layout


class OnnxRuntimeDialect:
    """Writes one graph whose inputs and outputs are the step contract of the device's runner.

    Inputs: `input_ids` int64 [B, S]; `past_len` and `query_len` int32 [B]; `logit_index` int64 [N],
    positions `b * S + s`; `kv_key_i` and `kv_value_i` float32 [B, kv_heads, capacity, head_dim]. Outputs:
    `logits` float32 [N, vocab]; `kv_key_i_out` and `kv_value_i_out`, to be bound to the memory of the
    inputs, of which only the first `past_len + query_len` positions are touched. A step is one row of many
    tokens or many rows of one token; after `accept_ragged_rows`, rows of up to S tokens, padded on the right.
    """

    def __init__(self, architecture: Architecture, shards: WeightShards, *, accuracy_level: int = 4) -> None:
        """Begin a graph; `accuracy_level` 4 multiplies in 8-bit integers, 0 in float32."""
        self._architecture = architecture
        self._shards = shards
        self._accuracy_level = accuracy_level
        self._tape = Tape()
        self._initializers: dict[str, ir.Value] = {}
        self._outputs: list[ir.Value] = []
        self._attentions: list[ir.Node] = []
        self._graph: ir.Graph | None = None
        self._inputs = {str(value.name): value for value in _step_inputs(architecture)}
        self._table: _SharedTable | None = None
        self._loaded_bytes = 0
        self._last_position, self._longest = self._sequence_lengths()

    @property
    def loaded_bytes(self) -> int:
        """Anonymous memory of the loaded matrices, bytes.

        The kernels keep their own copy of each: its codes, and a scale and a sum of codes for every group,
        float32. What is not multiplied (embedding, gains, rotary tables) stays mapped from the file.
        """
        return self._loaded_bytes

    def embedding(self, table: QuantizedTensor) -> ir.Value:
        """GatherBlockQuantized; its bytes serve a tied head too, under a second name and shape."""
        packed = pack_codes(table.codes, table.bits)
        region = self._shards.append(packed)
        flat = (table.rows, packed.shape[1] * packed.shape[2])
        codes = self._value(self._shards.tensor("embedding.codes", region, ir.DataType.UINT8, flat))
        scales = self._weight("embedding.scales", table.scales)
        head_codes = self._shards.tensor("head.codes", region, ir.DataType.UINT8, packed.shape)
        self._table = _SharedTable(head_codes, scales, _Layout.of(table))
        attributes = {
            "bits": table.bits,
            "block_size": table.group_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        inputs = [codes, self._inputs["input_ids"], scales]
        return self._op("GatherBlockQuantized", inputs, attributes, name="embedding", domain=_CONTRIB)

    def norm(self, x: ir.Value, gain: NDArray[np.float32], name: str) -> ir.Value:
        """SimplifiedLayerNormalization."""
        attributes = {"axis": -1, "epsilon": self._architecture.rms_epsilon, "stash_type": 1}
        inputs = [x, self._weight(f"{name}.gain", gain)]
        return self._op("SimplifiedLayerNormalization", inputs, attributes, name=name)

    def add_norm(
        self, x: ir.Value, residual: ir.Value, gain: NDArray[np.float32], name: str
    ) -> tuple[ir.Value, ir.Value]:
        """SkipSimplifiedLayerNormalization; its second and third outputs are of no use here."""
        normed, _, _, total = self._tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self._weight(f"{name}.gain", gain)],
            {"epsilon": self._architecture.rms_epsilon},
            num_outputs=4,
            domain=_CONTRIB,
            name=name,
        )
        return normed, total

    def linear(self, x: ir.Value, weight: QuantizedTensor, name: str) -> ir.Value:
        """MatMulNBits; a float minimum, which it does not know, becomes extra columns."""
        if weight.minima is not None:
            x = self._with_group_sums(x, weight, name)
            weight = fold_minima(weight)
        packed = pack_codes(weight.codes, weight.bits)
        region = self._shards.append(packed)
        codes = self._value(self._shards.tensor(f"{name}.codes", region, ir.DataType.UINT8, packed.shape))
        inputs = [x, codes, self._weight(f"{name}.scales", weight.scales)]
        if weight.zero_points is not None:
            inputs.append(self._weight(f"{name}.zero_points", pack_codes(weight.zero_points, weight.bits)))
        return self._matmul(inputs, _Layout.of(weight), name)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        """GroupQueryAttention over packed query, key and value."""
        shape = self._architecture
        cos, sin = self._rotary_tables()
        cache = [self._inputs[f"kv_{kind}_{layer}"] for kind in ("key", "value")]
        attended, key, value = self._tape.op_multi_out(
            "GroupQueryAttention",
            [qkv, None, None, *cache, self._last_position, self._longest, cos, sin],
            {
                "num_heads": shape.heads,
                "kv_num_heads": shape.kv_heads,
                "scale": shape.head_dim**-0.5,
                "do_rotary": 1,
                "local_window_size": shape.sliding_window or -1,
            },
            num_outputs=3,
            domain=_CONTRIB,
            name=f"layer{layer}.attention",
        )
        self._attentions.extend(node for node in (attended.producer(),) if node is not None)
        for kind, grown in (("key", key), ("value", value)):
            self._output(
                grown, f"kv_{kind}_{layer}_out", ["batch", shape.kv_heads, "capacity", shape.head_dim]
            )
        return attended

    def gated(self, gate_up: ir.Value, name: str) -> ir.Value:
        """QuickGelu with alpha 1 is SiLU in one node."""
        gate, up = self._tape.op_multi_out(
            "Split", [gate_up], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{name}.split"
        )
        open_gate = self._op("QuickGelu", [gate], {"alpha": 1.0}, name=f"{name}.silu", domain=_CONTRIB)
        return self._op("Mul", [open_gate, up], name=name)

    def head(
        self, x: ir.Value, residual: ir.Value, gain: NDArray[np.float32], weight: QuantizedTensor | None
    ) -> None:
        """Gathers the wanted rows first: the head of a whole prefill chunk would cost more than a layer."""
        total = self._op("Add", [x, residual], name="final_sum")
        row_shape = self._constant("row_shape", np.array([-1, self._architecture.hidden_size], np.int64))
        rows = self._op("Reshape", [total, row_shape], name="rows")
        wanted = self._op("Gather", [rows, self._inputs["logit_index"]], {"axis": 0}, name="wanted_rows")
        normed = self.norm(wanted, gain, "final_norm")
        logits = self._tied_head(normed) if weight is None else self.linear(normed, weight, "head")
        self._output(logits, "logits", ["logit_count", self._architecture.vocab_size])

    def save(self, path: Path) -> None:
        """Write the graph as it is now; raises ValueError if the decoder has no head yet."""
        if self._graph is None:
            self._graph = self._whole_graph()
        ir.save(ir.Model(self._graph, ir_version=_IR_VERSION, producer_name="edgellm"), path)

    def accept_ragged_rows(self) -> None:
        """From here on the graph needs 1.32, and a step may have rows of different lengths.

        The kernel wants room for the padding, `past_len + S <= capacity`, though it writes none of it.
        """
        for attention in self._attentions:
            attention.resize_inputs(_QUERY_SEQLENS + 1)
            attention.replace_input_with(_QUERY_SEQLENS, self._inputs["query_len"])

    def store_cache_as_int8(self, scales: KvScales) -> None:
        """From here on the graph needs 1.32, and the caches are int8: a value is its code times its scale."""
        for name, value in self._inputs.items():
            if name.startswith("kv_"):
                value.dtype = ir.DataType.INT8
        for layer, attention in enumerate(self._attentions):
            attention.resize_inputs(max(len(attention.inputs), _V_SCALE + 1))
            for index, kind, table in ((_K_SCALE, "key", scales.keys), (_V_SCALE, "value", scales.values)):
                scale = table[layer][None, :, None, :]
                attention.replace_input_with(index, self._constant(f"layer{layer}.{kind}_scale", scale))
            attention.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_CHANNEL")
            attention.attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_CHANNEL")
            attention.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
            for grown in attention.outputs[1:]:
                grown.dtype = ir.DataType.INT8

    def _whole_graph(self) -> ir.Graph:
        outputs = {str(value.name): value for value in self._outputs}
        if "logits" not in outputs:
            raise ValueError("the graph has no logits")
        return ir.Graph(
            inputs=list(self._inputs.values()),
            outputs=[outputs.pop("logits"), *outputs.values()],
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": _OPSET, _CONTRIB: 1},
            name="decoder",
        )

    def _tied_head(self, x: ir.Value) -> ir.Value:
        if self._table is None:
            raise ValueError("a tied head needs the embedding first")
        codes = self._value(self._table.codes)
        return self._matmul([x, codes, self._table.scales], self._table.layout, "head")

    def _matmul(self, inputs: Sequence[ir.Value], layout: _Layout, name: str) -> ir.Value:
        groups = -(-layout.columns // layout.group_size)
        self._loaded_bytes += layout.rows * groups * (layout.group_size * layout.bits // 8 + 8)
        attributes = {
            "K": layout.columns,
            "N": layout.rows,
            "bits": layout.bits,
            "block_size": layout.group_size,
            "accuracy_level": self._accuracy_level,
        }
        return self._op("MatMulNBits", inputs, attributes, name=name, domain=_CONTRIB)

    def _with_group_sums(self, x: ir.Value, weight: QuantizedTensor, name: str) -> ir.Value:
        table_name = f"group_sums.{weight.columns}"
        table = self._initializers.get(table_name)
        if table is None:
            table = self._weight(table_name, sum_columns(weight))
        sums = self._op("MatMul", [x, table], name=f"{name}.group_sums")
        return self._op("Concat", [x, sums], {"axis": -1}, name=f"{name}.extended")

    def _rotary_tables(self) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine of every position, float32 [context, head_dim / 2], shared by all layers."""
        if "rotary.cos" not in self._initializers:
            positions = np.arange(self._architecture.context_length)
            angles = np.outer(positions, np.asarray(self._architecture.inverse_frequencies))
            self._weight("rotary.cos", np.cos(angles).astype(np.float32))
            self._weight("rotary.sin", np.sin(angles).astype(np.float32))
        return self._initializers["rotary.cos"], self._initializers["rotary.sin"]

    def _sequence_lengths(self) -> tuple[ir.Value, ir.Value]:
        """Index of each row's last position int32 [B], and the longest length int32 []."""
        lengths = self._op("Add", [self._inputs["past_len"], self._inputs["query_len"]], name="lengths")
        one = self._constant("one", np.array([1], np.int32))
        last_position = self._op("Sub", [lengths, one], name="last_position")
        return last_position, self._op("ReduceMax", [lengths], {"keepdims": 0}, name="longest")

    def _op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
        domain: str = "",
    ) -> ir.Value:
        return self._tape.op(kind, inputs, attributes or {}, domain=domain, name=name)

    def _output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
        self._outputs.append(value)

    def _weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        region = self._shards.append(array)
        dtype = ir.DataType.from_numpy(array.dtype)
        return self._value(self._shards.tensor(name, region, dtype, array.shape))

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self._value(ir.tensor(array, name=name))

    def _value(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = str(tensor.name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._initializers[name] = value
        if self._graph is not None:
            self._graph.register_initializer(value)
        return value


def _step_inputs(architecture: Architecture) -> list[ir.Value]:
    cache: list[int | str] = ["batch", architecture.kv_heads, "capacity", architecture.head_dim]
    inputs = [
        ir.val("input_ids", dtype=ir.DataType.INT64, shape=["batch", "tokens"]),
        ir.val("past_len", dtype=ir.DataType.INT32, shape=["batch"]),
        ir.val("query_len", dtype=ir.DataType.INT32, shape=["batch"]),
        ir.val("logit_index", dtype=ir.DataType.INT64, shape=["logit_count"]),
    ]
    for layer in range(architecture.layers):
        names = (f"kv_key_{layer}", f"kv_value_{layer}")
        inputs.extend(ir.val(name, dtype=ir.DataType.FLOAT, shape=cache) for name in names)
    return inputs
