"""Searched clip: gives up a few outliers of a group where that makes the levels finer for all the others.

For each group a ladder of narrower ranges is tried, and the scale is then fitted to the codes by least
squares. The error of a candidate is e M eᵀ, e the error of the group's weights. M is the group's block of the
gram (see `InputStatistics`) where there is one, so that what counts is what the text makes of an error; else
the identity.

Works on blocks of one group of up to a few thousand rows, transposed so that each step is one long loop over
rows: memory beside the result is a few times 512 KiB, time about a nanosecond for a weight and a rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.quantization.grid import Grid, QuantizedTensor, Rounding

Floats = NDArray[np.float32]

LADDER = tuple(float(factor) for factor in np.linspace(1.0, 0.5, 12))
"""Ranges to try, as parts of the full one, widest first."""
SHORT_LADDER = (1.0, 0.9, 0.8, 0.7)
"""Enough to compare scalings of one matrix by."""

_BLOCK_WEIGHTS = 1 << 17
# What a narrower range has to gain, in squared steps: a matrix that lies on a grid stays on it bit by bit.
_LEAST_GAIN = 1e-6
# Part of the mean importance that every channel gets: a text is short, and a channel that it never woke has
# a use too.
_COMMON_IMPORTANCE = 0.01


@dataclass(frozen=True)
class Levels:
    """Where the levels of n groups lie: `origin + scale * code`, code an integer, lowest to lowest + top.

    `scales` is float32 `[n]`; `lowest` and `origins` are too, or one figure for all.
    """

    top: int
    scales: Floats
    lowest: Floats | np.float32
    origins: Floats | np.float32

    def codes(self, weights: Floats) -> Floats:
        """The nearest codes of `weights`, `[..., n]`, still as floats."""
        return self.nearest(self.units(weights))

    def nearest(self, units: Floats) -> Floats:
        """The nearest codes of weights in steps."""
        codes = np.rint(units)
        return np.asarray(np.clip(codes, self.lowest, self.lowest + np.float32(self.top), out=codes))

    def units(self, weights: Floats) -> Floats:
        """`weights`, `[..., n]`, in steps from their origin."""
        centred = weights if isinstance(self.origins, np.float32) else weights - self.origins
        return np.asarray(centred * _reciprocal(self.scales), np.float32)

    def values(self, codes: Floats) -> Floats:
        """What `codes`, `[..., n]`, stand for."""
        return np.asarray(codes * self.scales + self.origins, np.float32)

    def where(self, better: NDArray[np.bool_], other: Levels) -> Levels:
        """The levels of `other` for the groups that are `better`."""
        scales, lowest, origins = (
            np.where(better, theirs, ours)
            for theirs, ours in (
                (other.scales, self.scales),
                (other.lowest, self.lowest),
                (other.origins, self.origins),
            )
        )
        return Levels(
            self.top,
            scales,
            self.lowest if isinstance(self.lowest, np.float32) else lowest,
            self.origins if isinstance(self.origins, np.float32) else origins,
        )


def quantize_clipped(
    weight: Floats,
    rounding: Rounding,
    gram: Floats | None = None,
    ladder: Sequence[float] | None = None,
) -> QuantizedTensor:
    """Round `weight`, `[rows, columns]`, to levels chosen for each group; `gram` is `[columns, columns]`.

    The widest range wins ties. Columns that fill up the last group count for nothing.
    """
    ladder = ladder or usual_ladder(rounding)
    rows, columns = weight.shape
    result = empty_tensor(rows, columns, rounding)
    group_size = rounding.group_size
    height = max(1, _BLOCK_WEIGHTS // group_size)
    for group, start in enumerate(range(0, columns, group_size)):
        span = slice(start, min(start + group_size, columns))
        importance = None if gram is None else with_common_part(gram[span, span])
        for first in range(0, rows, height):
            block = np.ascontiguousarray(weight[first : first + height, span].T)
            levels = search_levels(block, rounding, importance, ladder)
            store(result, slice(first, first + height), group, levels, levels.codes(block))
    return result


def search_levels(
    weights: Floats,
    rounding: Rounding,
    importance: Floats | None = None,
    ladder: Sequence[float] = LADDER,
) -> Levels:
    """The best levels found for n groups, `weights` being `[group_size, n]`, one group a column.

    `importance` is M as above, `[group_size, group_size]`, or its diagonal.
    """
    low, high = weights.min(axis=0), weights.max(axis=0)
    best = _levels(low, high, ladder[0], rounding)
    best_error = _error(weights, best, importance)
    total = weights.shape[0] if importance is None else _trace(importance)
    least_gain = np.square(best.scales) * np.float32(_LEAST_GAIN * total)
    for factor in ladder[1:]:
        levels = _levels(low, high, factor, rounding)
        error = _error(weights, levels, importance)
        better = error < best_error - least_gain
        best, best_error = best.where(better, levels), np.where(better, error, best_error)
    fitted = _fitted(weights, best, importance)
    error = _error(weights, fitted, importance)
    return best.where(error < best_error - least_gain, fitted)


def empty_tensor(rows: int, columns: int, rounding: Rounding) -> QuantizedTensor:
    """A tensor to be filled by `store`."""
    groups, grid = -(-columns // rounding.group_size), rounding.grid
    return QuantizedTensor(
        bits=rounding.bits,
        columns=columns,
        codes=np.zeros((rows, groups, rounding.group_size), np.uint8),
        scales=np.zeros((rows, groups), np.float32),
        zero_points=np.zeros((rows, groups), np.uint8) if grid is Grid.INTEGER_ZERO else None,
        minima=np.zeros((rows, groups), np.float32) if grid is Grid.FLOAT_MINIMUM else None,
    )


def store(tensor: QuantizedTensor, rows: slice, group: int, levels: Levels, codes: Floats) -> None:
    """Put in place what one group of some rows became; `codes` are `[columns of the group, rows]`."""
    unsigned = (codes - levels.lowest).astype(np.uint8).T
    tensor.codes[rows, group, : unsigned.shape[1]] = unsigned
    tensor.codes[rows, group, unsigned.shape[1] :] = unsigned[:, -1:]
    tensor.scales[rows, group] = levels.scales
    if tensor.zero_points is not None:
        tensor.zero_points[rows, group] = (-levels.lowest).astype(np.uint8)
    if tensor.minima is not None:
        tensor.minima[rows, group] = levels.origins


def usual_ladder(rounding: Rounding) -> Sequence[float]:
    """The long one for 4 bits; 8 bits have levels enough for the full range."""
    return LADDER if rounding.bits == 4 else LADDER[:1]


def with_common_part(gram: Floats) -> Floats:
    """`gram` with a little of its mean diagonal added to the diagonal."""
    common = _COMMON_IMPORTANCE * float(gram.diagonal().mean())
    return np.asarray(gram + np.float32(common) * np.eye(len(gram), dtype=np.float32), np.float32)


def _levels(low: Floats, high: Floats, factor: float, rounding: Rounding) -> Levels:
    """Of groups with these extremes, the range narrowed by `factor`."""
    top, half = (1 << rounding.bits) - 1, 1 << (rounding.bits - 1)
    none = np.float32(0.0)
    if rounding.grid is Grid.SYMMETRIC:
        # Positive scales, as every loader takes them; the lowest code has no positive twin.
        scales = np.maximum(high / np.float32(half - 1), -low / np.float32(half)) * np.float32(factor)
        return Levels(top, _in_float16(scales), np.float32(-half), none)
    if rounding.grid is Grid.INTEGER_ZERO:
        low, high = np.minimum(low, none), np.maximum(high, none)
        full = (high - low) / np.float32(top)
        zero_points = np.clip(np.rint(-low * _reciprocal(full)), 0, top)
        return Levels(top, _in_float16(full * np.float32(factor)), -zero_points, none)
    span = high - low
    origins = low + span * np.float32((1.0 - factor) / 2)
    return Levels(top, span * np.float32(factor) / np.float32(top), none, origins)


def _in_float16(scales: Floats) -> Floats:
    """Scales that a float16 holds exactly: other runtimes store them so, and must not round them again.

    One that is out of its range, or so small that it would lose precision there, stays as it is.
    """
    normal = np.finfo(np.float16)
    fits = (scales >= np.float32(normal.tiny)) & (scales <= np.float32(normal.max))
    return np.where(fits, np.where(fits, scales, 1).astype(np.float16).astype(np.float32), scales)


def _error(weights: Floats, levels: Levels, importance: Floats | None) -> Floats:
    """The error e M eᵀ of each group when rounded to `levels`, `[n]`."""
    error = levels.units(weights)
    error -= levels.nearest(error)
    return np.asarray(_product(error, error, importance) * np.square(levels.scales), np.float32)


def _fitted(weights: Floats, levels: Levels, importance: Floats | None) -> Levels:
    """The levels that stand closest to `weights` if each keeps its code: linear regression."""
    codes = levels.codes(weights)
    if isinstance(levels.origins, np.float32):
        scales = _product(weights, codes, importance) * _reciprocal(_product(codes, codes, importance))
        scales = _in_float16(np.maximum(scales, np.float32(0.0)))
        return Levels(levels.top, scales, levels.lowest, levels.origins)
    ones = np.ones_like(codes[:, :1])
    total = _product(ones, ones, importance)
    centred = codes - _product(codes, ones, importance) / total
    off = weights - levels.origins  # the origin is near the weights: less is lost to cancellation
    slopes = _product(off, centred, importance) * _reciprocal(_product(centred, centred, importance))
    origins = levels.origins + _product(off - slopes * codes, ones, importance) / total
    return Levels(levels.top, np.maximum(slopes, np.float32(0.0)), levels.lowest, origins)


def _product(left: Floats, right: Floats, importance: Floats | None) -> Floats:
    """The product left M rightᵀ of each group (column), `[n]`."""
    if importance is None:
        return np.asarray(np.einsum("kn,kn->n", left, np.broadcast_to(right, left.shape)))
    weighted = importance @ left if importance.ndim == 2 else importance[:, None] * left
    return np.asarray(np.einsum("kn,kn->n", weighted, np.broadcast_to(right, left.shape)))


def _trace(importance: Floats) -> float:
    return float(importance.trace() if importance.ndim == 2 else importance.sum())


def _reciprocal(values: Floats) -> Floats:
    """1 / value, and 0 for a group of equal values, whose codes are then all the same."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1.0) / values
    return np.asarray(np.where(np.isfinite(inverse), inverse, np.float32(0.0)), dtype=np.float32)
