"""A decoder, written once for all families and all runtimes.

Families differ in what `Architecture` says; runtimes in how a `Dialect` says each word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_buildhost.architecture import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    KEY,
    KEY_NORM,
    OUTPUT,
    QUERY,
    QUERY_NORM,
    UP,
    VALUE,
    Architecture,
    layer_tensor,
)
from edgellm_buildhost.graph.dialect import Dialect, HeadNorms, Table
from edgellm_buildhost.progress import StageProgress
from edgellm_buildhost.quantization.layer import Linear
from edgellm_buildhost.quantization.rows import concatenate_linears, take_rows


class Weights(Protocol):
    """Where the decoder takes its weights from, in the order of the computation."""

    def linear(self, layer: int, part: str) -> Linear:
        """A linear map of a layer, one of `LINEARS`."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A gain or a bias by its full name."""

    def table(self, name: str) -> Table:
        """The embedding or the head."""


def write_decoder(
    architecture: Architecture, weights: Weights, dialect: Dialect, progress: StageProgress
) -> None:
    """Say the whole decoder in `dialect`; `progress` is told layers done, and all."""
    hidden = dialect.embedding(weights.table(EMBEDDING))
    update: ir.Value | None = None
    for layer in range(architecture.layers):
        update, hidden = write_layer(weights, dialect, architecture, layer, (update, hidden))
        progress(layer + 1, architecture.layers)
    if update is None:
        raise ValueError("a decoder has at least one layer")
    head = None if architecture.tied_embedding else weights.table(HEAD)
    dialect.head(update, hidden, weights.vector(FINAL_NORM), head)


def write_layer(
    weights: Weights,
    dialect: Dialect,
    architecture: Architecture,
    layer: int,
    stream: tuple[ir.Value | None, ir.Value],
) -> tuple[ir.Value, ir.Value]:
    """One layer behind a `stream` of what was added last, and what it was added to; returns the next two.

    Their sum is left to the next norm, which runtimes fuse with it.
    """
    update, hidden = stream
    writer = _LayerWriter(architecture, layer, weights, dialect)
    x, hidden = writer.norm(update, hidden, architecture.norms.attention, "attention_norm")
    x = dialect.attention(writer.linear(x, [QUERY, KEY, VALUE], "qkv"), layer, writer.head_norms())
    x = writer.linear(x, [OUTPUT], "attention_out")
    x = writer.output_norm(x, architecture.norms.attention_output, "attention_out_norm")
    x, hidden = writer.norm(x, hidden, architecture.norms.ffn, "ffn_norm")
    x = dialect.gated(writer.linear(x, [GATE, UP], "gate_up"), f"layer{layer}.gated")
    x = writer.linear(x, [DOWN], "down")
    return writer.output_norm(x, architecture.norms.ffn_output, "down_norm"), hidden


class _LayerWriter:
    """The words of one layer with its weights looked up."""

    def __init__(self, architecture: Architecture, layer: int, weights: Weights, dialect: Dialect) -> None:
        self._architecture = architecture
        self._layer = layer
        self._weights = weights
        self._dialect = dialect
        pairs = len(architecture.attention[layer].inverse_frequencies)
        self._turning = rotary_order(architecture.head_dim, pairs)

    def norm(
        self, update: ir.Value | None, hidden: ir.Value, part: str, name: str
    ) -> tuple[ir.Value, ir.Value]:
        gain = self._vector(part, "weight")
        name = f"layer{self._layer}.{name}"
        if update is None:
            return self._dialect.norm(hidden, gain, name), hidden
        return self._dialect.add_norm(update, hidden, gain, name)

    def output_norm(self, x: ir.Value, part: str | None, name: str) -> ir.Value:
        if part is None:
            return x
        return self._dialect.norm(x, self._vector(part, "weight"), f"layer{self._layer}.{name}")

    def linear(self, x: ir.Value, parts: Sequence[str], name: str) -> ir.Value:
        """All `parts` in one product; where a checkpoint has them in different forms, one product each."""
        name = f"layer{self._layer}.{name}"
        weights = [self._linear(part) for part in parts]
        try:
            weight = concatenate_linears(weights)
        except ValueError:
            apart = [
                self._dialect.linear(x, weight, f"{name}.{part.rpartition('.')[2]}", self._biases([part]))
                for part, weight in zip(parts, weights, strict=True)
            ]
            return self._dialect.side_by_side(apart, f"{name}.joined")
        return self._dialect.linear(x, weight, name, self._biases(parts))

    def head_norms(self) -> HeadNorms | None:
        if not self._architecture.qk_norm:
            return None
        query, key = (self._vector(part, "weight") for part in (QUERY_NORM, KEY_NORM))
        if self._turning is not None:
            query, key = query[self._turning], key[self._turning]
        return HeadNorms(query, key)

    def _linear(self, part: str) -> Linear:
        weight = self._weights.linear(self._layer, part)
        order = self._row_order(part)
        return weight if order is None else take_rows(weight, order)

    def _biases(self, parts: Sequence[str]) -> NDArray[np.float32] | None:
        if not self._architecture.biases.intersection(parts):
            return None
        return np.concatenate([self._bias(part) for part in parts])

    def _bias(self, part: str) -> NDArray[np.float32]:
        if part not in self._architecture.biases:
            return np.zeros(self._architecture.linear_shape(part)[0], np.float32)
        bias = self._vector(part, "bias")
        order = self._row_order(part)
        return bias if order is None else bias[order]

    def _row_order(self, part: str) -> NDArray[np.int64] | None:
        if self._turning is None or part not in {QUERY, KEY}:
            return None
        heads = self._architecture.heads if part == QUERY else self._architecture.kv_heads
        starts = np.arange(heads)[:, None] * self._architecture.head_dim
        return np.asarray(starts + self._turning, np.int64).reshape(-1)

    def _vector(self, part: str, kind: str) -> NDArray[np.float32]:
        return self._weights.vector(layer_tensor(self._layer, part, kind))


def rotary_order(head_dim: int, turning_pairs: int) -> NDArray[np.int64] | None:
    """The order of a head's channels that makes a partial rotation a whole one; None where it is whole.

    A model that turns only its first `2 n` channels pairs i with i + n. Kernels turn all, and pair i with
    i + head_dim / 2. Scores do not change when the channels of queries and keys are reordered alike: so the
    first of each pair go to the front of the head's first half, the second ones to that of its second half;
    the rest fills up, and turns by an angle of zero.
    """
    half = head_dim // 2
    if turning_pairs == half:
        return None
    still = np.arange(2 * turning_pairs, head_dim)
    first, second = np.split(still, 2)
    pairs = np.arange(turning_pairs)
    return np.concatenate([pairs, first, pairs + turning_pairs, second]).astype(np.int64)
