"""Rounds weight matrices to 4 or 8 bits in groups along the input dimension; pure functions on numpy arrays.

Four grids, `w` the weight and `q` its unsigned code:

- symmetric:       w = scale * (q - 2^(bits-1))
- integer zero:    w = scale * (q - zero_point), zero_point one of the codes
- float minimum:   w = scale * q + minimum, the grid of GGUF's Q4_1; a matrix which already lies on it is
  recovered exactly

A symmetric grid keeps one scale per group, the integer zero half a byte more, the float minimum four bytes
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[4, 8]


class Grid(Enum):
    """Where the levels of a group lie."""

    SYMMETRIC = "symmetric"
    INTEGER_ZERO = "integer zero"
    FLOAT_MINIMUM = "float minimum"


@dataclass(frozen=True)
class Rounding:
    """What a matrix is rounded to; columns in a group share their levels."""

    bits: Bits
    group_size: int
    grid: Grid

    def __post_init__(self) -> None:
        """Raises ValueError for a group size that no kernel takes."""
        _check_group_size(self.group_size)

    def for_width(self, columns: int) -> Rounding:
        """The same, but with an integer zero in place of a float minimum where the last group is not full.

        The kernels take float minima as sums over groups, which need full ones.
        """
        if self.grid is Grid.FLOAT_MINIMUM and columns % self.group_size:
            return replace(self, grid=Grid.INTEGER_ZERO)
        return self


@dataclass(frozen=True)
class KvScales:
    """Scales of an INT8 KV cache, one for each channel, float32 [layers, kv_heads, head_dim].

    A value is its code times the scale, -128 to 127; keys are stored with their rotary position.
    """

    keys: NDArray[np.float32]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix `[rows, columns]` as codes and the figures of each group.

    `codes` uint8 `[rows, groups, group_size]`, one code a byte; `scales` float32 `[rows, groups]`; exactly
    one of `zero_points` (uint8 `[rows, groups]`) and `minima` (float32 `[rows, groups]`) may be present,
    neither means symmetric. Columns that fill up the last group dequantize to something, and are cut off by
    `dequantize`.
    """

    bits: Bits
    columns: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None = None
    minima: NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """Output width of the matrix."""
        return int(self.codes.shape[0])

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return int(self.codes.shape[1])

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return int(self.codes.shape[2])

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, float32 `[rows, columns]`."""
        levels = self.codes.astype(np.float32)
        if self.minima is not None:
            values = levels * self.scales[..., None] + self.minima[..., None]
        else:
            zero = (
                np.float32(1 << (self.bits - 1)) if self.zero_points is None else self.zero_points[..., None]
            )
            values = (levels - zero) * self.scales[..., None]
        return np.asarray(values, dtype=np.float32).reshape(self.rows, -1)[:, : self.columns]

    def take_rows(self, order: slice | NDArray[np.intp]) -> QuantizedTensor:
        """The same matrix with the rows that `order` names, in that order."""
        return replace(
            self,
            codes=self.codes[order],
            scales=self.scales[order],
            zero_points=None if self.zero_points is None else self.zero_points[order],
            minima=None if self.minima is None else self.minima[order],
        )


def quantize(weight: NDArray[np.float32], bits: Bits, group_size: int, grid: Grid) -> QuantizedTensor:
    """Round `weight`, float32 `[rows, columns]`, to the nearest level of its group.

    `group_size` is a power of two from 16 to 256; raises ValueError otherwise. All values must be finite.
    """
    _check_group_size(group_size)
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, the shape is {weight.shape}")
    groups = _grouped(np.asarray(weight, dtype=np.float32), group_size)
    columns = int(weight.shape[1])
    if grid is Grid.SYMMETRIC:
        return _symmetric(groups, columns, bits)
    if grid is Grid.INTEGER_ZERO:
        return _integer_zero(groups, columns, bits)
    return _float_minimum(groups, columns, bits)


def concatenate(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One matrix with the rows of all `parts`, which must share bits, columns, group size and grid."""
    first = parts[0]
    for part in parts[1:]:
        alike = (part.bits, part.columns, part.group_size) == (first.bits, first.columns, first.group_size)
        same_grid = (part.zero_points is None, part.minima is None) == (
            first.zero_points is None,
            first.minima is None,
        )
        if not alike or not same_grid:
            raise ValueError("matrices on different grids cannot be joined")
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    minima = [part.minima for part in parts if part.minima is not None]
    return QuantizedTensor(
        bits=first.bits,
        columns=first.columns,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
        minima=np.concatenate(minima) if minima else None,
    )


def pack_codes(codes: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """Codes along the last axis to bytes, the first of two 4-bit codes in the low half; 8-bit codes as
    they are.
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.ascontiguousarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def _check_group_size(group_size: int) -> None:
    if group_size not in {16, 32, 64, 128, 256}:
        raise ValueError(f"group size {group_size} is not one of 16, 32, 64, 128, 256")


def _grouped(weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """`[rows, groups, group_size]`, the last group filled with its last column so that its range stays
    the same.
    """
    rows, columns = weight.shape
    missing = -columns % group_size
    if missing:
        weight = np.pad(weight, ((0, 0), (0, missing)), mode="edge")
    return weight.reshape(rows, -1, group_size)


def _symmetric(groups: NDArray[np.float32], columns: int, bits: Bits) -> QuantizedTensor:
    # Scales are positive, as every loader takes them. The lowest code has no positive twin: it is of use
    # where the most negative weight is the largest.
    half = 1 << (bits - 1)
    low, high = groups.min(axis=2), groups.max(axis=2)
    scales = np.maximum(high / np.float32(half - 1), -low / np.float32(half)).astype(np.float32)
    codes = np.clip(np.rint(groups * _reciprocal(scales)[..., None]) + half, 0, 2 * half - 1).astype(np.uint8)
    return QuantizedTensor(bits, columns, codes, scales)


def _integer_zero(groups: NDArray[np.float32], columns: int, bits: Bits) -> QuantizedTensor:
    top = (1 << bits) - 1
    low, high = np.minimum(groups.min(axis=2), 0.0), np.maximum(groups.max(axis=2), 0.0)
    scales = ((high - low) / np.float32(top)).astype(np.float32)
    inverse = _reciprocal(scales)
    zero_points = np.clip(np.rint(-low * inverse), 0, top)
    codes = np.clip(np.rint(groups * inverse[..., None]) + zero_points[..., None], 0, top).astype(np.uint8)
    return QuantizedTensor(bits, columns, codes, scales, zero_points=zero_points.astype(np.uint8))


def _float_minimum(groups: NDArray[np.float32], columns: int, bits: Bits) -> QuantizedTensor:
    top = (1 << bits) - 1
    low, high = groups.min(axis=2), groups.max(axis=2)
    scales = ((high - low) / np.float32(top)).astype(np.float32)
    codes = np.clip(np.rint((groups - low[..., None]) * _reciprocal(scales)[..., None]), 0, top).astype(
        np.uint8
    )
    return QuantizedTensor(bits, columns, codes, scales, minima=low.astype(np.float32))


def _reciprocal(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 for a group of equal values, whose codes are then all the same."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1.0) / scales
    return np.asarray(np.where(np.isfinite(inverse), inverse, np.float32(0.0)), dtype=np.float32)
