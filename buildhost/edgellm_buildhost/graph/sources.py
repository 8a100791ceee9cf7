"""Where a decoder takes its weights from: a float checkpoint, or a quantized one with rounded tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture, layer_tensor, row_ranges
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.weights import PAGE_BYTES
from edgellm_buildhost.quantization.grid import Grid, QuantizedTensor, concatenate, quantize
from edgellm_buildhost.quantization.layer import Linear
from edgellm_buildhost.quantized.base import QuantizedCheckpoint

_PRODUCTS = 4
_TABLE_GROUP_SIZES = (64, 32, 16)
_CHUNK_BYTES = 64 << 20


class FloatWeights:
    """The weights of a checkpoint as floats, tables too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take from `checkpoint`."""
        self._checkpoint = checkpoint

    def linear(self, layer: int, part: str) -> Linear:
        """As published."""
        return self._checkpoint.tensor(layer_tensor(layer, part))

    def vector(self, name: str) -> NDArray[np.float32]:
        """As published."""
        return self._checkpoint.tensor(name)

    def table(self, name: str) -> NDArray[np.float32]:
        """As published."""
        return self._checkpoint.tensor(name)


class QuantizedWeights:
    """The weights of a quantized checkpoint; its tables, which are floats there, rounded to 8 bits."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        """Take from `checkpoint`; raises BuildError where its shape allows no groups in the tables."""
        self._checkpoint = checkpoint
        self._group_size = table_group_size(checkpoint.architecture)

    def linear(self, layer: int, part: str) -> Linear:
        """As the checkpoint has it; one that was left in floats is rounded to 8 bits.

        So is o_proj where AWQ scaled its inputs and grouped queries leave the factors no place to go.
        """
        linear = self._checkpoint.linear(layer, part)
        if not isinstance(linear, np.ndarray):
            return linear
        size = next((size for size in _TABLE_GROUP_SIZES if linear.shape[1] % size == 0), 0)
        if not size:
            raise BuildError(
                f"layer {layer}: the width {linear.shape[1]} of {part} is no multiple of 16",
                "choose another model",
            )
        return quantize(linear, 8, size, Grid.SYMMETRIC)

    def vector(self, name: str) -> NDArray[np.float32]:
        """As the checkpoint has it."""
        return self._checkpoint.vector(name)

    def table(self, name: str) -> QuantizedTensor:
        """Rounded a few rows at a time: as floats, a table can be larger than all else together."""
        ranges = row_ranges(self._checkpoint.architecture, name, _CHUNK_BYTES)
        pieces = (self._checkpoint.rows(name, start, stop) for start, stop in ranges)
        return concatenate([quantize(piece, 8, self._group_size, Grid.SYMMETRIC) for piece in pieces])


def table_group_size(architecture: Architecture) -> int:
    """Group size of embedding and head: the largest of 64, 32 and 16 that divides the hidden size.

    Raises BuildError when none does.
    """
    hidden = architecture.hidden_size
    for size in _TABLE_GROUP_SIZES:
        if hidden % size == 0:
            return size
    raise BuildError(f"hidden_size {hidden} is no multiple of 16", "choose another model")


def unquantized_bytes(architecture: Architecture) -> int:
    """Most that an engine has on disk beside its linears, bytes: tables, gains, biases, rotary tables, and
    what aligns each tensor in its shard.
    """
    group_size = table_group_size(architecture)
    tables = 1 if architecture.tied_embedding else 2
    elements = tables * architecture.vocab_size * architecture.hidden_size
    vectors = architecture.layers * sum(architecture.vectors().values()) + architecture.hidden_size
    kinds = {kind.inverse_frequencies for kind in architecture.attention}
    rotary = len(kinds) * architecture.context_length * architecture.head_dim
    # Of each product of a layer: codes, scales, zero points; then the vectors.
    tensors = architecture.layers * (3 * _PRODUCTS + len(architecture.vectors()))
    tensors += 2 * tables + 1 + 2 * len(kinds)
    return elements + 4 * (elements // group_size + vectors + rotary) + tensors * PAGE_BYTES
