"""Float minima for kernels that know integer zero points only: what is left over becomes extra input columns.

A weight on the grid `scale * q + minimum` equals `scale * (q - zero) + rest`, with `zero` the code nearest to
`-minimum / scale` and `rest` one number per row and group, at most half a scale. So

    W x  =  scale * (q - zero) x  +  rest s,        s = the sum of x over each group

and `rest s` is one more product with few columns. Appended to the matrix as 4-bit groups of its own, it
goes through the same kernel: 18 sums make 576 columns into 608, 5 % more work, instead of a second product
in float32. Rounding `rest` to 4 bits leaves an error of at most 1/30 of a scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.quantization.grid import Grid, QuantizedTensor, quantize


def fold_minima(weight: QuantizedTensor) -> QuantizedTensor:
    """The same matrix with integer zero points, and columns for the group sums appended.

    Its input is `[x, sums of x over each group, zeros]`, `columns` wide; `sum_columns` makes the sums.
    Raises ValueError when the matrix has no minima or its last group is not full.
    """
    if weight.minima is None:
        raise ValueError("the matrix has no minima")
    if weight.columns != weight.groups * weight.group_size:
        raise ValueError("the last group is not full")
    scales = np.where(weight.scales == 0, np.float32(1.0), weight.scales)
    top = (1 << weight.bits) - 1
    zero_points = np.clip(np.rint(-weight.minima / scales), 0, top).astype(np.uint8)
    # A group of equal values has scale 0: its minimum is all rest.
    rest = weight.minima + weight.scales * zero_points
    extra = extra_columns(weight.columns, weight.group_size)
    padded = np.pad(rest, ((0, 0), (0, extra - weight.groups)))
    tail = quantize(padded, weight.bits, weight.group_size, Grid.SYMMETRIC)
    middle = np.full((weight.rows, tail.groups), 1 << (weight.bits - 1), np.uint8)
    return QuantizedTensor(
        bits=weight.bits,
        columns=weight.columns + extra,
        codes=np.concatenate([weight.codes, tail.codes], axis=1),
        scales=np.concatenate([weight.scales, tail.scales], axis=1),
        zero_points=np.concatenate([zero_points, middle], axis=1),
    )


def extra_columns(columns: int, group_size: int) -> int:
    """Columns that `fold_minima` appends: one for each group, up to a whole group."""
    return -(-(columns // group_size) // group_size) * group_size


def sum_columns(weight: QuantizedTensor) -> NDArray[np.float32]:
    """The matrix `[columns, extra]` of ones and zeros which turns x into its group sums."""
    sums = np.zeros((weight.columns, extra_columns(weight.columns, weight.group_size)), np.float32)
    columns = np.arange(weight.columns)
    sums[columns, columns // weight.group_size] = 1.0
    return sums
