"""The dialect of ONNX Runtime: contrib operations that fuse what its kernels do best, on versions 1.23 to
1.32.

One MatMulNBits for query, key and value, one for gate and up; the residual sum inside the norm; rotary
positions and the cache inside GroupQueryAttention; the embedding's bytes read again by a tied head.

What GroupQueryAttention takes grew with the versions: 12 inputs in 1.23, 16 from 1.28 at the latest to 1.31,
and a 17th, the number of tokens that are not padding, in 1.32. A node with more inputs than a version knows
is refused, so one graph cannot serve both.

Its `local_window_size` changed its meaning in 1.24: the graph for all versions has a bias instead (`window`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from edgellm_buildhost.architecture import Activation, Architecture, AttentionKind
from edgellm_buildhost.graph.dialect import HeadNorms, Table
from edgellm_buildhost.graph.linears import CONTRIB, LinearWriter, NBitsLayout
from edgellm_buildhost.graph.values import ShardedValues, WeightValues, small_constant
from edgellm_buildhost.graph.weights import WeightShards
from edgellm_buildhost.graph.window import window_bias
from edgellm_buildhost.quantization.grid import KvScales, QuantizedTensor, pack_codes
from edgellm_buildhost.quantization.layer import Linear

RUNTIME_REQUIRES = ">=1.23,<1.33"
RUNTIME_REQUIRES_INT8_KV = ">=1.32,<1.33"
_OPSET = 21
IR_VERSION = 10  # the newest that 1.23 reads is 11; 10 has all that is used here
_ROTARY_PIECE = 4096  # positions
# Indices of inputs of GroupQueryAttention.
_ATTENTION_BIAS, _K_SCALE, _V_SCALE, _QUERY_SEQLENS = 10, 12, 13, 16


Doubles = NDArray[np.float64]


class OnnxRuntimeDialect:
    """Writes one graph whose inputs and outputs are the step contract of the device's runner.

    Inputs: `input_ids` int64 [B, S]; `past_len` and `query_len` int32 [B]; `logit_index` int64 [N],
    positions `b * S + s`; `kv_key_i` and `kv_value_i` float32 [B, kv_heads, capacity, head_dim]. Outputs:
    `logits` float32 [N, vocab]; `kv_key_i_out` and `kv_value_i_out`, to be bound to the memory of the
    inputs, of which only the first `past_len + query_len` positions are touched. A step is one row of many
    tokens or many rows of one token; after `accept_ragged_rows`, rows of up to S tokens, padded on the right.
    """

    def __init__(
        self, architecture: Architecture, weights: WeightShards | WeightValues, *, accuracy_level: int = 4
    ) -> None:
        """Begin a graph; `accuracy_level` 4 multiplies in 8-bit integers, 0 in float32."""
        self._architecture = architecture
        self._values = ShardedValues(weights) if isinstance(weights, WeightShards) else weights
        self._tape = Tape()
        self._graph: ir.Graph | None = None
        self.outputs: dict[str, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._attentions: list[tuple[ir.Node, AttentionKind]] = []
        self._window_biases: dict[int, ir.Value] = {}
        self._window_nodes: list[ir.Node] = []
        self._rotary: dict[tuple[float, ...], tuple[ir.Value, ir.Value]] = {}
        self._table: tuple[ir.Value, ir.Value, NBitsLayout] | ir.Value | None = None
        self._linears = LinearWriter(self._op, self._values, accuracy_level)
        self.inputs = {str(value.name): value for value in step_inputs(architecture)}
        self._last_position, self._longest = self._sequence_lengths()

    @property
    def loaded_bytes(self) -> int:
        """Anonymous memory of the loaded matrices, bytes.

        The kernels keep their own copy of each. What is not multiplied (embedding, gains, rotary tables)
        stays mapped from the file.
        """
        return self._linears.loaded_bytes

    def embedding(self, table: Table) -> ir.Value:
        """GatherBlockQuantized; its bytes serve a tied head too, under a second name and shape."""
        ids = self.inputs["input_ids"]
        if isinstance(table, QuantizedTensor):
            hidden = self._quantized_embedding(table, ids)
        else:
            self._table = self._values.value("embedding.weight", table)
            hidden = self._op("Gather", [self._table, ids], {"axis": 0}, name="embedding")
        scale = self._architecture.embedding_scale
        return hidden if scale is None else self._times(hidden, scale, "embedding_scaled")

    def norm(self, x: ir.Value, gain: NDArray[np.float32], name: str) -> ir.Value:
        """SimplifiedLayerNormalization."""
        attributes = {"axis": -1, "epsilon": self._architecture.rms_epsilon, "stash_type": 1}
        inputs = [x, self._values.value(f"{name}.gain", gain)]
        return self._op("SimplifiedLayerNormalization", inputs, attributes, name=name)

    def add_norm(
        self, x: ir.Value, residual: ir.Value, gain: NDArray[np.float32], name: str
    ) -> tuple[ir.Value, ir.Value]:
        """SkipSimplifiedLayerNormalization; its second and third outputs are of no use here."""
        normed, _, _, total = self._tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self._values.value(f"{name}.gain", gain)],
            {"epsilon": self._architecture.rms_epsilon},
            num_outputs=4,
            domain=CONTRIB,
            name=name,
        )
        return normed, total

    def linear(
        self, x: ir.Value, weight: Linear, name: str, bias: NDArray[np.float32] | None = None
    ) -> ir.Value:
        """The product for the weight's form."""
        return self._linears.write(x, weight, name, bias)

    def side_by_side(self, values: Sequence[ir.Value], name: str) -> ir.Value:
        """Concat."""
        return self._op("Concat", values, {"axis": -1}, name=name)

    def attention(self, qkv: ir.Value, layer: int, norms: HeadNorms | None = None) -> ir.Value:
        """GroupQueryAttention, over packed query, key and value where no norm comes between."""
        shape, kind = self._architecture, self._architecture.attention[layer]
        packed = [qkv, None, None] if norms is None else self._normed_heads(qkv, norms, f"layer{layer}")
        cache = [self.inputs[f"kv_{name}_{layer}"] for name in ("key", "value")]
        attributes = {
            "num_heads": shape.heads,
            "kv_num_heads": shape.kv_heads,
            "scale": shape.attention_scale,
            "do_rotary": 1,
        }
        if shape.attention_softcap is not None:
            attributes["softcap"] = shape.attention_softcap
        tables = self._rotary_tables(kind.inverse_frequencies)
        window = kind.sliding_window
        bias = [] if window is None else [None, self._window_bias(window)]
        attended, key, value = self._tape.op_multi_out(
            "GroupQueryAttention",
            [*packed, *cache, self._last_position, self._longest, *tables, *bias],
            attributes,
            num_outputs=3,
            domain=CONTRIB,
            name=f"layer{layer}.attention",
        )
        self._attentions.extend((node, kind) for node in (attended.producer(),) if node is not None)
        for name, grown in (("key", key), ("value", value)):
            self.output(
                grown, f"kv_{name}_{layer}_out", ["batch", shape.kv_heads, "capacity", shape.head_dim]
            )
        return attended

    def gated(self, gate_up: ir.Value, name: str) -> ir.Value:
        """QuickGelu with alpha 1 is SiLU in one node."""
        gate, up = self._tape.op_multi_out(
            "Split", [gate_up], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{name}.split"
        )
        if self._architecture.activation is Activation.SILU:
            opened = self._op("QuickGelu", [gate], {"alpha": 1.0}, name=f"{name}.silu", domain=CONTRIB)
        else:
            opened = self._op("Gelu", [gate], {"approximate": "tanh"}, name=f"{name}.gelu")
        return self._op("Mul", [opened, up], name=name)

    def head(self, x: ir.Value, residual: ir.Value, gain: NDArray[np.float32], weight: Table | None) -> None:
        """Gathers the wanted rows first: the head of a whole prefill chunk would cost more than a layer."""
        total = self.add(x, residual, "final_sum")
        row_shape = self._constant("row_shape", np.array([-1, self._architecture.hidden_size], np.int64))
        rows = self._op("Reshape", [total, row_shape], name="rows")
        wanted = self._op("Gather", [rows, self.inputs["logit_index"]], {"axis": 0}, name="wanted_rows")
        normed = self.norm(wanted, gain, "final_norm")
        logits = self._tied_head(normed) if weight is None else self.linear(normed, weight, "head")
        cap = self._architecture.logit_softcap
        if cap is not None:
            flat = self._op("Tanh", [self._times(logits, 1.0 / cap, "logits_scaled")], name="logits_flat")
            logits = self._times(flat, cap, "logits_capped")
        self.output(logits, "logits", ["logit_count", self._architecture.vocab_size])

    def save(self, path: Path) -> None:
        """Write the graph as it is now; raises ValueError if the decoder has no head yet."""
        if self._graph is None:
            if "logits" not in self.outputs:
                raise ValueError("the graph has no logits")
            outputs = {"logits": self.outputs["logits"], **self.outputs}
            self._graph = self.graph(list(self.inputs.values()), list(outputs.values()))
        ir.save(ir.Model(self._graph, ir_version=IR_VERSION, producer_name="edgellm"), path)

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """All nodes until now as a graph with these inputs and outputs."""
        used = {id(value): value for node in self._tape.nodes for value in node.inputs if value is not None}
        initializers = [value for value in used.values() if value.const_value is not None]
        return ir.Graph(
            inputs=inputs,
            outputs=outputs,
            nodes=self._tape.nodes,
            initializers=initializers,
            opset_imports={"": _OPSET, CONTRIB: 1},
            name="decoder",
        )

    def add(self, x: ir.Value, y: ir.Value, name: str) -> ir.Value:
        """Their sum."""
        return self._op("Add", [x, y], name=name)

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Make a float32 value an output of the graph."""
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
        self.outputs[name] = value

    def accept_ragged_rows(self) -> None:
        """From here on the graph needs 1.32, and a step may have rows of different lengths.

        The kernel wants room for the padding, `past_len + S <= capacity`, though it writes none of it.
        """
        for attention, kind in self._attentions:
            attention.resize_inputs(_QUERY_SEQLENS + 1)
            attention.replace_input_with(_QUERY_SEQLENS, self.inputs["query_len"])
            if kind.sliding_window is not None:
                attention.replace_input_with(_ATTENTION_BIAS, None)
                size = ir.AttrInt64("local_window_size", kind.sliding_window)
                attention.attributes["local_window_size"] = size
        if self._graph is not None:
            self._graph.remove(self._window_nodes, safe=True)
            for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
                del self._graph.initializers[name]

    def store_cache_as_int8(self, scales: KvScales) -> None:
        """From here on the graph needs 1.32, and the caches are int8: a value is its code times its scale."""
        for name, value in self.inputs.items():
            if name.startswith("kv_"):
                value.dtype = ir.DataType.INT8
        for layer, (attention, _) in enumerate(self._attentions):
            attention.resize_inputs(max(len(attention.inputs), _V_SCALE + 1))
            for index, kind, table in ((_K_SCALE, "key", scales.keys), (_V_SCALE, "value", scales.values)):
                scale = table[layer][None, :, None, :]
                attention.replace_input_with(index, self._constant(f"layer{layer}.{kind}_scale", scale))
            attention.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_CHANNEL")
            attention.attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_CHANNEL")
            attention.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
            for grown in attention.outputs[1:]:
                grown.dtype = ir.DataType.INT8

    def _quantized_embedding(self, table: QuantizedTensor, ids: ir.Value) -> ir.Value:
        packed = pack_codes(table.codes, table.bits)
        flat = (table.rows, packed.shape[1] * packed.shape[2])
        codes = self._values.value("embedding.codes", packed, flat)
        scales = self._values.value("embedding.scales", table.scales)
        self._table = (self._values.again(codes, "head.codes", packed.shape), scales, NBitsLayout.of(table))
        attributes = {
            "bits": table.bits,
            "block_size": table.group_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        return self._op(
            "GatherBlockQuantized", [codes, ids, scales], attributes, name="embedding", domain=CONTRIB
        )

    def _tied_head(self, x: ir.Value) -> ir.Value:
        if self._table is None:
            raise ValueError("a tied head needs the embedding first")
        if isinstance(self._table, ir.Value):
            return self._op("FusedMatMul", [x, self._table], {"transB": 1}, name="head", domain=CONTRIB)
        codes, scales, layout = self._table
        return self._linears.matmul_nbits([x, codes, scales], layout, "head")

    def _normed_heads(self, qkv: ir.Value, norms: HeadNorms, name: str) -> list[ir.Value]:
        """Query, key and value apart, the heads of the first two each normed by itself."""
        shape = self._architecture
        sizes = self._constant("qkv_sizes", np.array([shape.query_size, *[shape.kv_size] * 2], np.int64))
        parts = self._tape.op_multi_out(
            "Split", [qkv, sizes], {"axis": -1}, num_outputs=3, name=f"{name}.qkv_split"
        )
        normed = []
        for part, gain, kind in zip(parts, (norms.query, norms.key), ("query", "key"), strict=False):
            heads = self._constant(f"{kind}_heads", np.array([0, 0, -1, shape.head_dim], np.int64))
            width = self._constant("side_by_side", np.array([0, 0, -1], np.int64))
            split = self._op("Reshape", [part, heads], name=f"{name}.{kind}_heads")
            normed_heads = self.norm(split, gain, f"{name}.{kind}_norm")
            normed.append(self._op("Reshape", [normed_heads, width], name=f"{name}.{kind}_normed"))
        return [*normed, parts[2]]

    def _rotary_tables(self, frequencies: tuple[float, ...]) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine of every position, float32 [context, head_dim / 2], shared by layers of a kind.

        Channels that do not turn have an angle of zero.
        """
        if frequencies not in self._rotary:
            name = f"rotary{len(self._rotary) or ''}"
            steps = np.zeros(self._architecture.head_dim // 2)
            steps[: len(frequencies)] = frequencies
            count = self._architecture.context_length
            self._rotary[frequencies] = (
                self._values.value(f"{name}.cos", _turned(np.cos, count, steps)),
                self._values.value(f"{name}.sin", _turned(np.sin, count, steps)),
            )
        return self._rotary[frequencies]

    def _sequence_lengths(self) -> tuple[ir.Value, ir.Value]:
        """Index of each row's last position int32 [B], and the longest length int32 []."""
        lengths = self._op("Add", [self.inputs["past_len"], self.inputs["query_len"]], name="lengths")
        one = self._constant("one", np.array([1], np.int32))
        last_position = self._op("Sub", [lengths, one], name="last_position")
        return last_position, self._op("ReduceMax", [lengths], {"keepdims": 0}, name="longest")

    def _window_bias(self, window: int) -> ir.Value:
        """What hides keys behind a window, shared by all layers that have it."""
        if window not in self._window_biases:
            first = len(self._tape.nodes)
            lengths = (self.inputs["past_len"], self.inputs["query_len"], self._longest)
            self._window_biases[window] = window_bias(self._op, self._constant, lengths, window)
            self._window_nodes.extend(self._tape.nodes[first:])
        return self._window_biases[window]

    def _times(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        return self._op("Mul", [x, self._constant(f"{name}.factor", np.float32(factor))], name=name)

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

    def _constant(self, name: str, array: NDArray[Any] | np.float32) -> ir.Value:
        value = self._constants.get(name)
        if value is None:
            value = self._constants[name] = small_constant(name, np.asarray(array))
            if self._graph is not None:
                self._graph.register_initializer(value)
        return value


def _turned(turn: Callable[[Doubles], Doubles], count: int, steps: Doubles) -> NDArray[np.float32]:
    """`turn` of every position's angles; computed in float64 a piece at a time: contexts are long."""
    table = np.empty((count, len(steps)), np.float32)
    for start in range(0, count, _ROTARY_PIECE):
        positions = np.arange(start, min(start + _ROTARY_PIECE, count))
        table[start : start + len(positions)] = turn(np.outer(positions, steps))
    return table


def step_inputs(architecture: Architecture) -> list[ir.Value]:
    """The inputs of a step, as the class above describes them."""
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
