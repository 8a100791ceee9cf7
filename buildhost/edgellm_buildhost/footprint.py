"""How much the weights of an engine take, in memory and on disk, from shapes and forms alone."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_buildhost.architecture import LINEARS, Architecture
from edgellm_buildhost.graph.linears import NBitsLayout
from edgellm_buildhost.graph.minima import extra_columns
from edgellm_buildhost.graph.sources import table_group_size
from edgellm_buildhost.graph.weights import PAGE_BYTES
from edgellm_buildhost.quantization.grid import Grid, Rounding

_TABLE_BITS = 8
_SCALE_BYTES = 4


@dataclass(frozen=True)
class LinearForm:
    """How linear maps are stored.

    `group_size` weights of a row share a scale; None means the whole row, for products of 8-bit integers.
    `minima`: groups have a float minimum; without it, zero points or none, which takes the same.
    """

    bits: int
    group_size: int | None
    minima: bool = False

    @classmethod
    def of(cls, rounding: Rounding | None) -> LinearForm:
        """The form of what is rounded so; None: products of 8-bit integers."""
        if rounding is None:
            return cls(8, None)
        return cls(rounding.bits, rounding.group_size, minima=rounding.grid is Grid.FLOAT_MINIMUM)


def weights_bytes(architecture: Architecture, form: LinearForm) -> int:
    """Anonymous memory of all loaded matrices: linears of that form, and the head.

    What is not multiplied (embedding, gains, rotary tables) stays mapped from the file. Raises BuildError
    for a hidden size that no group of the head divides.
    """
    layer = sum(_linear_bytes(*architecture.linear_shape(part), form) for part in LINEARS)
    vocab, hidden = architecture.vocab_size, architecture.hidden_size
    head = NBitsLayout(vocab, hidden, _TABLE_BITS, table_group_size(architecture))
    return architecture.layers * layer + head.loaded_bytes


def _linear_bytes(rows: int, columns: int, form: LinearForm) -> int:
    """A linear map as its kernel takes it.

    Float minima become columns of their own, a sum for each group; they need full groups, and a matrix that
    has none gets integer zero points instead.
    """
    size = form.group_size
    if size is None:
        return rows * (columns + _SCALE_BYTES)
    if form.minima and columns % size == 0:
        columns += extra_columns(columns, size)
    return NBitsLayout(rows, columns, form.bits, size).loaded_bytes


def stored_bytes(rows: int, columns: int, rounding: Rounding) -> int:
    """What a matrix takes in an engine's files: codes, float32 scales, zero points as wide as codes."""
    rounding = rounding.for_width(columns)
    size, bits = rounding.group_size, rounding.bits
    if rounding.grid is Grid.FLOAT_MINIMUM:
        columns += extra_columns(columns, size)
    groups = -(-columns // size)
    zero_points = 0 if rounding.grid is Grid.SYMMETRIC else -(-groups * bits // 8)
    return rows * (groups * (size * bits // 8 + _SCALE_BYTES) + zero_points)


def group_sum_bytes(architecture: Architecture, rounding: Rounding) -> int:
    """What float minima need beside the matrices: a table for each width, which sums an input's groups."""
    widths = {architecture.linear_shape(part)[1] for part in LINEARS}
    full = [width for width in widths if rounding.for_width(width).grid is Grid.FLOAT_MINIMUM]
    return sum(4 * width * extra_columns(width, rounding.group_size) + PAGE_BYTES for width in full)
