"""SmoothQuant: 8-bit weights and 8-bit inputs (W8A8), after Xiao et al. 2022 (arXiv 2211.10438).

An input is rounded by one scale for all its channels, so one channel with large values costs all others their
resolution. Part of its size is moved into the weights: s = max |x|^alpha / max |w|^(1 - alpha), channel by
channel, folded as `folding` says. The paper has one alpha for a model; here each point takes the best of a
few by the error that both roundings are expected to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.quantization.awq import gram_error
from edgellm_buildhost.quantization.folding import fold, shared
from edgellm_buildhost.quantization.inputs import checked, sampled_rows, stacked
from edgellm_buildhost.quantization.layer import (
    READERS,
    FloatLayer,
    InputStatistics,
    Int8Tensor,
    Point,
    QuantizedLayer,
    Statistics,
)

Floats = NDArray[np.float32]

SEARCHED_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_TOP_CODE = 127
# The strongest channel is divided by at most this much against the weakest: see `awq`.
_MOST_RATIO = 1e4


@dataclass(frozen=True)
class SmoothQuant:
    """Smooths each point by the best of `alphas`, or not at all; then rounds rows, and fixes input scales.

    One alpha is the paper's method. Memory: three matrices as large as the layer's largest point or gram.
    """

    alphas: tuple[float, ...] = SEARCHED_ALPHAS

    needs_statistics = True
    sequential = False

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """As `Method.quantize`; raises BuildError for missing or damaged statistics."""
        statistics = checked(architecture, layer, statistics)
        scales = {point: self._scales(architecture, point, weights, statistics[point]) for point in Point}
        folded = fold(architecture, weights, scales)
        return QuantizedLayer(_rounded(folded, scales, statistics), folded.vectors)

    def _scales(
        self, architecture: Architecture, point: Point, weights: FloatLayer, seen: InputStatistics
    ) -> Floats:
        weight = stacked(weights, point)
        inputs = shared(architecture, point, seen.max_abs, np.max)
        largest = shared(architecture, point, np.abs(weight).max(axis=0), np.max)
        candidates = [smoothing(inputs, largest, alpha) for alpha in self.alphas]
        if len(candidates) == 1:
            return candidates[0]
        candidates.insert(0, np.ones_like(inputs))
        sample = sampled_rows(weight)
        return min(candidates, key=lambda scales: expected_error(sample, seen, scales))


def smoothing(inputs: Floats, weights: Floats, alpha: float) -> Floats:
    """What to divide inputs by, from the largest magnitudes of each channel in inputs and weights.

    All ones where there are only zeros.
    """
    if inputs.max() <= 0 or weights.max() <= 0:
        return np.ones_like(inputs)
    inputs, weights = (np.maximum(x, x.max() / np.float32(_MOST_RATIO)) for x in (inputs, weights))
    scales = inputs ** np.float32(alpha) / weights ** np.float32(1.0 - alpha)
    scales = np.maximum(scales, scales.max() / np.float32(_MOST_RATIO))
    # Only ratios count: the middle of the extremes becomes 1.
    return np.asarray(scales / (np.sqrt(scales.min()) * np.sqrt(scales.max())), np.float32)


def expected_error(weight: Floats, seen: InputStatistics, scales: Floats) -> float:
    """Mean squared error of the outputs, summed over rows: of the weights exactly, of the inputs by a model.

    Rounding an input by steps of d is taken as noise of d²/12, or as its own size where that is less.
    """
    folded = weight * scales
    codes, steps = _codes(folded)
    of_weights = gram_error((codes * steps[:, None]) / scales - weight, seen.gram)
    step = input_scale(seen.max_abs / scales)
    noise = np.minimum(step**2 / 12, seen.gram.diagonal() / np.square(scales))
    return of_weights + float(np.square(folded).sum(axis=0) @ noise)


def input_scale(max_abs: Floats) -> float:
    """Of codes -127 to 127 for the values seen; 1 where there were only zeros."""
    largest = float(max_abs.max())
    return largest / _TOP_CODE if largest > 0 else 1.0


def _rounded(
    weights: FloatLayer, scales: Mapping[Point, Floats], statistics: Statistics
) -> dict[str, Int8Tensor]:
    linears = {}
    for point, parts in READERS.items():
        step = input_scale(statistics[point].max_abs / scales[point])
        for part in parts:
            codes, rows = _codes(weights.linears[part])
            linears[part] = Int8Tensor(codes.astype(np.int8), rows, step)
    return linears


def _codes(weight: Floats) -> tuple[Floats, Floats]:
    """Codes -127 to 127, still as floats, and the scale of each row."""
    scales = np.abs(weight).max(axis=1) / np.float32(_TOP_CODE)
    scales = np.where(scales > 0, scales, np.float32(1.0)).astype(np.float32)
    return np.asarray(np.rint(weight / scales[:, None]), np.float32), scales
