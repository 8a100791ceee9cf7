"""The contract of a quantization method: one decoder layer goes in as floats and comes out quantized.

    float layer + statistics of what enters its linears ──method──▶ quantized layer

Nothing else passes between layers, so memory follows one layer and a build can resume behind any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, Architecture
from edgellm_buildhost.quantization.grid import QuantizedTensor


class Point(str, Enum):
    """Where in a layer a linear map reads: the values at a point enter all linears of `READERS[point]`."""

    ATTENTION = "attention"
    ATTENTION_OUTPUT = "attention_output"
    FFN = "ffn"
    FFN_OUTPUT = "ffn_output"


READERS: Mapping[Point, tuple[str, ...]] = {
    Point.ATTENTION: (QUERY, KEY, VALUE),
    Point.ATTENTION_OUTPUT: (OUTPUT,),
    Point.FFN: (GATE, UP),
    Point.FFN_OUTPUT: (DOWN,),
}


@dataclass(frozen=True)
class InputStatistics:
    """Of the vectors x that calibration saw at a point; float32, `in` their length.

    `gram` is the mean of x xᵀ, [in, in]: the error of a matrix W rounded to Q on this text is
    tr((W - Q) gram (W - Q)ᵀ), summed over rows. `mean_abs` and `max_abs` are of each channel, [in].
    """

    tokens: int
    gram: NDArray[np.float32]
    mean_abs: NDArray[np.float32]
    max_abs: NDArray[np.float32]


Statistics = Mapping[Point, InputStatistics]


@dataclass(frozen=True)
class Int8Tensor:
    """A matrix for products of 8-bit integers (W8A8): weights per row, inputs by one scale for all.

    `codes` int8 `[rows, columns]`, `scales` float32 `[rows]`: w = scale * code. An input x becomes
    `round(x / input_scale)`, kept to -128..127.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    input_scale: float

    @property
    def rows(self) -> int:
        """Output width of the matrix."""
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        """Input width of the matrix."""
        return int(self.codes.shape[1])

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, float32 `[rows, columns]`."""
        return np.asarray(self.codes * self.scales[:, None], np.float32)


@dataclass(frozen=True)
class Fp8Tensor:
    """A matrix in FP8 E4M3, one scale for the weights and one for the inputs; for checkpoints only.

    `values` ml_dtypes.float8_e4m3fn `[rows, columns]`: w = scale * value, x = input_scale * value.
    """

    values: NDArray[np.generic]
    scale: float
    input_scale: float

    @property
    def rows(self) -> int:
        """Output width of the matrix."""
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        """Input width of the matrix."""
        return int(self.values.shape[1])

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that the values stand for, float32 `[rows, columns]`."""
        return np.asarray(self.values.astype(np.float32) * np.float32(self.scale))


Linear = QuantizedTensor | Int8Tensor | Fp8Tensor | NDArray[np.float32]
"""A linear map `[out, in]` in any form; a plain array is one that was left as it is."""


@dataclass(frozen=True)
class FloatLayer:
    """A decoder layer as published: linears by `LINEARS`; gains and biases by `Architecture.vectors()`.

    All float32. A method makes new arrays and leaves these alone.
    """

    linears: Mapping[str, NDArray[np.float32]]
    vectors: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class QuantizedLayer:
    """The same layer after a method, which may have moved scales between its linears and vectors."""

    linears: Mapping[str, Linear]
    vectors: Mapping[str, NDArray[np.float32]]

    def dequantize(self) -> FloatLayer:
        """The float layer that this one stands for (rounding of inputs apart)."""
        floats = {
            part: linear if isinstance(linear, np.ndarray) else linear.dequantize()
            for part, linear in self.linears.items()
        }
        return FloatLayer(floats, self.vectors)


class Method(Protocol):
    """A way to quantize a layer.

    `needs_statistics`: whether calibration has to run. `sequential`: whether the statistics of a layer are
    to be taken behind the quantized layers before it (GPTQ) or behind the float ones.
    """

    needs_statistics: bool
    sequential: bool

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """The layer of that index, quantized; pure: equal arguments give equal results."""
