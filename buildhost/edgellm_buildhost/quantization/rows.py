"""Rows of linear maps in any form: put below each other, taken in another order, or cut out.

What a row computes depends on no other row, so nothing is rounded again. An FP8 matrix has one scale for all
its rows and an INT8 one a single input scale; parts that differ there are joined only if they share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.quantization.grid import QuantizedTensor, concatenate
from edgellm_buildhost.quantization.layer import Fp8Tensor, Int8Tensor, Linear

Order = slice | Sequence[int] | NDArray[np.integer]


def concatenate_linears(parts: Sequence[Linear]) -> Linear:
    """One linear map with the rows of all `parts`, which must have the same form, columns and shared scales.

    Raises ValueError where they differ, and for no parts at all.
    """
    if not parts:
        raise ValueError("no linear maps to join")
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    grouped = [part for part in parts if isinstance(part, QuantizedTensor)]
    int8 = [part for part in parts if isinstance(part, Int8Tensor)]
    fp8 = [part for part in parts if isinstance(part, Fp8Tensor)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    if len(grouped) == len(parts):
        return concatenate(grouped)
    if len(int8) == len(parts):
        return _concatenate_int8(int8)
    if len(fp8) == len(parts):
        return _concatenate_fp8(fp8)
    kinds = sorted({type(part).__name__ for part in parts})
    raise ValueError(f"linear maps of different forms cannot be joined: {', '.join(kinds)}")


def take_rows(linear: Linear, order: Order) -> Linear:
    """The rows of `linear` that `order` names (a slice or indices), in that order."""
    rows = order if isinstance(order, slice) else np.asarray(order, dtype=np.intp)
    if isinstance(linear, np.ndarray):
        return linear[rows]
    if isinstance(linear, QuantizedTensor):
        return linear.take_rows(rows)
    if isinstance(linear, Int8Tensor):
        return replace(linear, codes=linear.codes[rows], scales=linear.scales[rows])
    return replace(linear, values=linear.values[rows])


def _concatenate_int8(parts: Sequence[Int8Tensor]) -> Int8Tensor:
    if len({part.input_scale for part in parts}) > 1:
        raise ValueError("INT8 matrices with different input scales cannot be joined")
    codes, scales = (
        np.concatenate(arrays) for arrays in zip(*((p.codes, p.scales) for p in parts), strict=True)
    )
    return Int8Tensor(codes, scales, parts[0].input_scale)


def _concatenate_fp8(parts: Sequence[Fp8Tensor]) -> Fp8Tensor:
    if len({(part.scale, part.input_scale) for part in parts}) > 1:
        raise ValueError("FP8 matrices with different scales cannot be joined")
    return replace(parts[0], values=np.concatenate([part.values for part in parts]))
