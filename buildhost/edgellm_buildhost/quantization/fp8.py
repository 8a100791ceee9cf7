"""FP8 E4M3 weights and inputs, one scale of each for a point: a checkpoint for boards with FP8.

The matrices that read at a point share one scale: some families store them as one tensor (Phi's qkv_proj),
which has a single scale. A smaller matrix keeps its precision, for E4M3 rounds each value by its own size;
only weights below 2^-6 / 448 = 1/28672 of the point's largest leave the normal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.quantization.inputs import checked
from edgellm_buildhost.quantization.layer import (
    READERS,
    FloatLayer,
    Fp8Tensor,
    Linear,
    QuantizedLayer,
    Statistics,
)

LARGEST = 448.0
"""The largest value of E4M3."""


@dataclass(frozen=True)
class Fp8:
    """The largest weight and the largest input of a point become the largest value of E4M3.

    Memory: the result and one matrix.
    """

    needs_statistics = True
    sequential = False

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """As `Method.quantize`; raises BuildError for missing or damaged statistics."""
        statistics = checked(architecture, layer, statistics)
        linears: dict[str, Linear] = {}
        for point, parts in READERS.items():
            scale = _scale(*(weights.linears[part] for part in parts))
            input_scale = _scale(statistics[point].max_abs)
            linears |= {part: to_fp8(weights.linears[part], input_scale, scale) for part in parts}
        return QuantizedLayer(linears, weights.vectors)


def to_fp8(weight: NDArray[np.float32], input_scale: float, scale: float | None = None) -> Fp8Tensor:
    """`weight` by a scale that is not below its own (None: its own), with that of its inputs."""
    scale = _scale(weight) if scale is None else scale
    # A quotient may exceed the largest value by its last bit, and E4M3 has no infinity: it would become NaN.
    values = np.clip(weight / np.float32(scale), -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return Fp8Tensor(values, scale, input_scale)


def _scale(*arrays: NDArray[np.float32]) -> float:
    """What the largest of all these values is divided by; 1 where there are only zeros."""
    largest = max(float(np.abs(values).max()) for values in arrays)
    return largest / LARGEST if largest > 0 else 1.0
