"""The vocabulary that a decoder is written in; a dialect says each word in the operations of one runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantization.layer import Linear

Table = QuantizedTensor | NDArray[np.float32]
"""An embedding or a head, `[vocab, hidden]`."""


@dataclass(frozen=True)
class HeadNorms:
    """Gains, float32 [head_dim], of the RMS norms of each query and key head (QK norm)."""

    query: NDArray[np.float32]
    key: NDArray[np.float32]


class Dialect(Protocol):
    """Words of a decoder; each appends nodes to the graph and returns the value that they make.

    Values are `[batch, tokens, width]` unless said otherwise. Words are called in the order of the
    computation; weights are written out at once, and a dialect keeps none of them.
    """

    def embedding(self, table: Table) -> ir.Value:
        """The rows of `table` for the input ids, times the model's embedding scale."""

    def norm(self, x: ir.Value, gain: NDArray[np.float32], name: str) -> ir.Value:
        """RMS norm of `x` with a gain per channel."""

    def add_norm(
        self, x: ir.Value, residual: ir.Value, gain: NDArray[np.float32], name: str
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of `x + residual`, and the sum itself."""

    def linear(
        self, x: ir.Value, weight: Linear, name: str, bias: NDArray[np.float32] | None = None
    ) -> ir.Value:
        """`x` times the transpose of `weight`, which is `[out, in]`, plus the bias."""

    def side_by_side(self, values: Sequence[ir.Value], name: str) -> ir.Value:
        """The channels of all values, in that order."""

    def attention(self, qkv: ir.Value, layer: int, norms: HeadNorms | None = None) -> ir.Value:
        """Causal attention over the cache of `layer`, which it extends, rotary positions inside.

        `qkv` has all query heads, then all key heads, then all value heads side by side.
        """

    def gated(self, gate_up: ir.Value, name: str) -> ir.Value:
        """The model's activation of the first half of the channels times the second half."""

    def head(self, x: ir.Value, residual: ir.Value, gain: NDArray[np.float32], weight: Table | None) -> None:
        """Logits of the wanted positions, from the RMS norm of `x + residual`; None: the embedding's
        table again.
        """
