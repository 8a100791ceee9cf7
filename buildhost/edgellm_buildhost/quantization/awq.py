"""Activation-aware weight quantization, after Lin et al. 2023 (arXiv 2306.00978).

Channels whose inputs are large are scaled up before rounding, so that their relative error is smaller, and
the scale is folded into what makes the input (`folding`). How much is searched for each point: s = mean |x|
to the power of alpha. Where the paper runs samples through the layer, the error is exact here for the whole
text: tr(E G Eᵀ), E the error of the matrix and G the gram of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.quantization.clip import LADDER, SHORT_LADDER, quantize_clipped
from edgellm_buildhost.quantization.folding import fold, rescaled, shared
from edgellm_buildhost.quantization.grid import Rounding, quantize
from edgellm_buildhost.quantization.inputs import RoundingByPoint, checked, rounding_at, sampled_rows, stacked
from edgellm_buildhost.quantization.layer import (
    READERS,
    FloatLayer,
    InputStatistics,
    Linear,
    Point,
    QuantizedLayer,
    Statistics,
)
from edgellm_buildhost.quantization.rtn import round_matrix

Floats = NDArray[np.float32]

# Exponents to try, in twentieths: 0 to 1 in steps of 0.2, then around the best in smaller ones.
_COARSE = range(0, 21, 4)
_FINER = (2, 1)
# The strongest channel is scaled up by at most this much against the weakest: gains stay far from the ends of
# float16.
_MOST_RATIO = 1e4


@dataclass(frozen=True)
class Awq:
    """Searches a scaling for each point at 4 bits, then the clip of each group; 8 bits are clipped only.

    On the rows that the search looks at (all, up to 512 at a point) the error is never larger than that of
    plain rounding, which is one of the candidates. Memory: three matrices as large as the layer's largest
    point or gram.
    """

    rounding: RoundingByPoint

    needs_statistics = True
    sequential = False

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """As `Method.quantize`; raises BuildError for missing or damaged statistics."""
        statistics = checked(architecture, layer, statistics)
        scales, plain = self.search(architecture, weights, statistics)
        folded = fold(architecture, weights, scales)
        linears: dict[str, Linear] = {}
        for point, parts in READERS.items():
            seen = statistics[point]
            gram = rescaled(seen, scales[point]).gram if point in scales else seen.gram
            rounding = rounding_at(self.rounding, point)
            for part in parts:
                linears[part] = round_matrix(folded.linears[part], rounding, point not in plain, gram)
        return QuantizedLayer(linears, folded.vectors)

    def search(
        self, architecture: Architecture, weights: FloatLayer, statistics: Statistics
    ) -> tuple[dict[Point, Floats], set[Point]]:
        """The scales of points that gain by some, and the points at which plain rounding was best."""
        scales: dict[Point, Floats] = {}
        plain: set[Point] = set()
        for point in Point:
            rounding = rounding_at(self.rounding, point)
            if rounding.bits != 4:
                continue
            seen = statistics[point]
            importance = shared(architecture, point, seen.mean_abs)
            weight = sampled_rows(stacked(weights, point))
            trial = _Trial(weight, seen, rounding.for_width(weight.shape[1]))
            # The search is rough: its winner has to stand beside no scaling, and beside no clip either.
            found = _scales(importance, _best_alpha(trial, importance))
            error, unscaled = (trial.error(by, LADDER) for by in (found, np.ones_like(found)))
            if trial.plain_error() <= min(error, unscaled):
                plain.add(point)
            elif error < unscaled:
                scales[point] = found
        return scales, plain


@dataclass(frozen=True)
class _Trial:
    """Errors of one matrix under different scalings."""

    weight: Floats
    seen: InputStatistics
    rounding: Rounding

    def error(self, scales: Floats, ladder: Sequence[float] = SHORT_LADDER) -> float:
        """Scaled and clipped: roughly, which is enough to compare scalings by."""
        gram = rescaled(self.seen, scales).gram
        rounded = quantize_clipped(self.weight * scales, self.rounding, gram, ladder)
        return gram_error(rounded.dequantize() / scales - self.weight, self.seen.gram)

    def plain_error(self) -> float:
        """Neither scaled nor clipped."""
        rounded = quantize(self.weight, self.rounding.bits, self.rounding.group_size, self.rounding.grid)
        return gram_error(rounded.dequantize() - self.weight, self.seen.gram)


def gram_error(error: Floats, gram: Floats) -> float:
    """tr(E G Eᵀ). EᵀE is symmetric, which costs half a product."""
    return float(np.vdot(gram, error.T @ error))


def _best_alpha(trial: _Trial, importance: Floats) -> float:
    """The exponent with the least error; the smaller one wins ties."""
    errors: dict[int, float] = {}

    def least(twentieths: Iterable[int]) -> int:
        for step in twentieths:
            if 0 <= step <= 20 and step not in errors:
                errors[step] = trial.error(_scales(importance, step / 20))
        return min(errors, key=lambda step: (errors[step], step))

    best = least(_COARSE)
    for step in _FINER:
        best = least((best - step, best + step))
    return best / 20


def _scales(importance: Floats, alpha: float) -> Floats:
    """The power importance ** alpha, its extremes at equal distance from 1; ones where nothing was seen."""
    largest = float(importance.max())
    if largest <= 0.0 or alpha == 0.0:
        return np.ones_like(importance)
    scales = (np.maximum(importance, largest / _MOST_RATIO) / np.float32(largest)) ** np.float32(alpha)
    return np.asarray(scales / (np.sqrt(scales.min()) * np.sqrt(scales.max())), np.float32)
