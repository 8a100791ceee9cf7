"""How ONNX Runtime multiplies by each form of a linear map.

groups of 4 or 8 bits    MatMulNBits; inputs stay floats, or are rounded to 8 bits inside (accuracy level 4)
8-bit weights and inputs  QuantizeLinear, then MatMulIntegerToFloat: integer products, scaled back once
floats                    FusedMatMul
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.minima import fold_minima, sum_columns
from edgellm_buildhost.graph.values import WeightValues
from edgellm_buildhost.quantization.grid import QuantizedTensor, pack_codes
from edgellm_buildhost.quantization.layer import Fp8Tensor, Int8Tensor, Linear

CONTRIB = "com.microsoft"

AddNode = Callable[..., ir.Value]
"""`add(kind, inputs, attributes, name=..., domain=...)` appends a node and returns its output."""


@dataclass(frozen=True)
class NBitsLayout:
    """What MatMulNBits needs to know of a matrix beside its bytes."""

    rows: int
    columns: int
    bits: int
    group_size: int

    @classmethod
    def of(cls, weight: QuantizedTensor) -> NBitsLayout:
        """The layout of `weight`."""
        return cls(weight.rows, weight.columns, weight.bits, weight.group_size)

    @property
    def loaded_bytes(self) -> int:
        """Memory of the kernel's own copy: codes, and a scale and a sum of codes for every group, float32."""
        groups = -(-self.columns // self.group_size)
        return self.rows * groups * (self.group_size * self.bits // 8 + 8)


class LinearWriter:
    """Appends products to a graph, and counts what the loaded matrices take."""

    def __init__(self, add: AddNode, values: WeightValues, accuracy_level: int) -> None:
        """Add nodes with `add`, weights through `values`; `accuracy_level` is MatMulNBits' own."""
        self._add = add
        self._values = values
        self._accuracy_level = accuracy_level
        self._shared: dict[str, ir.Value] = {}
        self.loaded_bytes = 0

    def write(self, x: ir.Value, weight: Linear, name: str, bias: NDArray[np.float32] | None) -> ir.Value:
        """`x` times the transpose of `weight`, plus `bias`."""
        if isinstance(weight, QuantizedTensor):
            return self._grouped(x, weight, name, bias)
        if isinstance(weight, Int8Tensor):
            return self._int8(x, weight, name, bias)
        if isinstance(weight, Fp8Tensor):
            raise BuildError(
                f"{name}: FP8 weights cannot run in ONNX Runtime",
                "choose --quant int8-smoothquant or int4-gptq for this runtime; FP8 is for Thor's own",
            )
        return self._float(x, weight, name, bias)

    def matmul_nbits(
        self, inputs: Sequence[ir.Value | None], layout: NBitsLayout, name: str, level: int | None = None
    ) -> ir.Value:
        """MatMulNBits itself."""
        self.loaded_bytes += layout.loaded_bytes
        attributes: Mapping[str, Any] = {
            "K": layout.columns,
            "N": layout.rows,
            "bits": layout.bits,
            "block_size": layout.group_size,
            "accuracy_level": self._accuracy_level if level is None else level,
        }
        return self._add("MatMulNBits", inputs, attributes, name=name, domain=CONTRIB)

    def _grouped(
        self, x: ir.Value, weight: QuantizedTensor, name: str, bias: NDArray[np.float32] | None
    ) -> ir.Value:
        if weight.minima is not None:
            x = self._with_group_sums(x, weight, name)
            weight = fold_minima(weight)
        inputs: list[ir.Value | None] = [
            x,
            self._values.value(f"{name}.codes", pack_codes(weight.codes, weight.bits)),
            self._values.value(f"{name}.scales", weight.scales),
        ]
        if weight.zero_points is not None:
            packed = pack_codes(weight.zero_points, weight.bits)
            inputs.append(self._values.value(f"{name}.zero_points", packed))
        product = self.matmul_nbits(inputs, NBitsLayout.of(weight), name)
        return self._plus(product, bias, name)

    def _int8(self, x: ir.Value, weight: Int8Tensor, name: str, bias: NDArray[np.float32] | None) -> ir.Value:
        """Codes lie `[in, out]`, as the kernel reads them."""
        scale = self._values.value(f"{name}.input_scale", np.array(weight.input_scale, np.float32))
        zero = self._once("int8_zero", np.array(0, np.int8))
        rounded = self._add("QuantizeLinear", [x, scale, zero], {}, name=f"{name}.rounded")
        codes = self._values.value(f"{name}.codes", np.ascontiguousarray(weight.codes.T))
        scales = self._values.value(f"{name}.scales", weight.scales)
        self.loaded_bytes += weight.codes.nbytes + weight.scales.nbytes
        product = self._add(
            "MatMulIntegerToFloat", [rounded, codes, scale, scales], {}, name=name, domain=CONTRIB
        )
        return self._plus(product, bias, name)

    def _float(
        self, x: ir.Value, weight: NDArray[np.float32], name: str, bias: NDArray[np.float32] | None
    ) -> ir.Value:
        self.loaded_bytes += weight.nbytes
        matrix = self._values.value(f"{name}.weight", weight)
        product = self._add("FusedMatMul", [x, matrix], {"transB": 1}, name=name, domain=CONTRIB)
        return self._plus(product, bias, name)

    def _plus(self, product: ir.Value, bias: NDArray[np.float32] | None, name: str) -> ir.Value:
        if bias is None:
            return product
        return self._add("Add", [product, self._values.value(f"{name}.bias", bias)], {}, name=f"{name}.sum")

    def _with_group_sums(self, x: ir.Value, weight: QuantizedTensor, name: str) -> ir.Value:
        table = self._once(f"group_sums.{weight.columns}x{weight.group_size}", sum_columns(weight))
        sums = self._add("MatMul", [x, table], {}, name=f"{name}.group_sums")
        return self._add("Concat", [x, sums], {"axis": -1}, name=f"{name}.extended")

    def _once(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A value that several products share."""
        if name not in self._shared:
            self._shared[name] = self._values.value(name, array)
        return self._shared[name]
