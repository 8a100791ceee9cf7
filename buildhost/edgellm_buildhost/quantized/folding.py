"""Moves factors at the inputs of a layer's linears into what produces those inputs.

ModelOpt leaves some of its smoothing scales beside a linear, to be multiplied into the inputs at run time.
The gain of the norm before it, or the rows of `v_proj` and `up_proj`, can take them instead, exactly. Where
several readers want different factors there is no such place, and the linear takes the factors into its own
columns, as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import DOWN, OUTPUT, UP, VALUE, Architecture
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantization.layer import READERS, Int8Tensor, Linear, Point

Factors = NDArray[np.float32]


class Folding:
    """Where the factors of one checkpoint go. Nothing is kept: a factor is read when it is asked for."""

    def __init__(self, architecture: Architecture, read: Callable[[int, str], Factors | None]) -> None:
        """`read` gives the factors `[in]` at the inputs of a layer's linear, or None."""
        self._architecture = architecture
        self._read = read

    def linear(self, layer: int, part: str, linear: Linear) -> Linear:
        """The linear with the factors that it takes from others, or keeps, in its weights."""
        rows = self._of_rows(layer, part)
        linear = linear if rows is None else scale_rows(linear, rows)
        own = self._read(layer, part)
        if own is None or self._is_moved(layer, part):
            return linear
        return _floats(linear) * own

    def vector(self, layer: int, part: str, values: Factors) -> Factors:
        """A gain or bias, `part` as in `Architecture.vectors()`, with the factors that it takes."""
        stem, _, kind = part.rpartition(".")
        factors = self._of_rows(layer, stem) if kind == "bias" else self._of_norm(layer, stem)
        return values if factors is None else values * factors

    def _of_norm(self, layer: int, norm: str) -> Factors | None:
        norms = self._architecture.norms
        point = {norms.attention: Point.ATTENTION, norms.ffn: Point.FFN}.get(norm)
        return None if point is None else self._shared(layer, point)

    def _of_rows(self, layer: int, part: str) -> Factors | None:
        """Factors of the rows of v_proj and up_proj, those of the linear behind them."""
        if part == UP:
            return self._read(layer, DOWN)
        return self._of_values(layer) if part == VALUE else None

    def _of_values(self, layer: int) -> Factors | None:
        """o_proj's factors by channel of a value, where all query heads that share it agree."""
        factors = self._read(layer, OUTPUT)
        if factors is None:
            return None
        shape = self._architecture
        heads = factors.reshape(shape.kv_heads, -1, shape.head_dim)
        return heads[:, 0].reshape(-1) if (heads == heads[:, :1]).all() else None

    def _shared(self, layer: int, point: Point) -> Factors | None:
        """The factors at a point, where all its readers agree."""
        first, *others = [self._read(layer, part) for part in READERS[point]]
        if first is None:
            return None
        return first if all(other is not None and np.array_equal(first, other) for other in others) else None

    def _is_moved(self, layer: int, part: str) -> bool:
        if part == DOWN:
            return True
        if part == OUTPUT:
            return self._of_values(layer) is not None
        return self._shared(layer, next(point for point in Point if part in READERS[point])) is not None


def scale_rows(linear: Linear, factors: Factors) -> Linear:
    """The linear with each row multiplied by its factor; no code changes."""
    if isinstance(linear, QuantizedTensor):
        minima = None if linear.minima is None else linear.minima * factors[:, None]
        return replace(linear, scales=linear.scales * factors[:, None], minima=minima)
    if isinstance(linear, Int8Tensor):
        return replace(linear, scales=linear.scales * factors)
    return _floats(linear) * factors[:, None]  # FP8 has one scale for all rows


def _floats(linear: Linear) -> Factors:
    return linear if isinstance(linear, np.ndarray) else linear.dequantize()
