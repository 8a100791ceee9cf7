"""Round to nearest, at 4 or 8 bits, with or without a searched clip: no calibration needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.quantization.clip import quantize_clipped
from edgellm_buildhost.quantization.grid import QuantizedTensor, Rounding, quantize
from edgellm_buildhost.quantization.inputs import RoundingByPoint, rounding_at
from edgellm_buildhost.quantization.layer import READERS, FloatLayer, Linear, QuantizedLayer, Statistics


@dataclass(frozen=True)
class RoundToNearest:
    """Rounds each weight to the nearest level; `clip` searches the range of each group.

    Memory: the result and one matrix.
    """

    rounding: RoundingByPoint
    clip: bool = True

    needs_statistics = False
    sequential = False

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """As `Method.quantize`; statistics are not looked at."""
        del architecture, layer, statistics
        linears: dict[str, Linear] = {}
        for point, parts in READERS.items():
            rounding = rounding_at(self.rounding, point)
            for part in parts:
                linears[part] = round_matrix(weights.linears[part], rounding, self.clip)
        return QuantizedLayer(linears, weights.vectors)


def round_matrix(
    weight: NDArray[np.float32],
    rounding: Rounding,
    clip: bool,
    gram: NDArray[np.float32] | None = None,
) -> QuantizedTensor:
    """`weight` on the grid asked for, or on the one that its width allows."""
    rounding = rounding.for_width(weight.shape[1])
    if clip:
        return quantize_clipped(weight, rounding, gram)
    return quantize(weight, rounding.bits, rounding.group_size, rounding.grid)
