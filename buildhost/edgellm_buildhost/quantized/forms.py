"""How one linear map is written as tensors: ModelOpt's forms, and ours where ModelOpt has none.

`out` and `in` are the widths, `groups` those of a row:

    algorithm                 weight                   weight_scale       further tensors
    W4A16_AWQ                 uint8 [out / 2, in]      [out, groups]      -
    W8A16                     int8  [out, in]          [out]              -
    W8A8_SQ_PER_CHANNEL       int8  [out, in]          [out]              input_scale []
    FP8                       E4M3  [out, in]          []                 input_scale []
    EDGELLM_W4_ZERO_POINT     as W4A16_AWQ             [out, groups]      weight_zero_point int8 [out, groups]
    EDGELLM_W4_MINIMUM        as W4A16_AWQ             [out, groups]      weight_minimum [out, groups]
    EDGELLM_W8                int8  [out, groups, n]   [out, groups]      -
    EDGELLM_W8_ZERO_POINT     as EDGELLM_W8            [out, groups]      weight_zero_point int8 [out, groups]
    EDGELLM_W8_MINIMUM        as EDGELLM_W8            [out, groups]      weight_minimum [out, groups]

The last three have three axes so that a loader that does not know them fails: tensorrt-edgellm 0.11 takes an
int8 matrix of unknown algorithm as it is, without its scales. Scales and minima are float32. Stored integers
are signed, our code less half of its range: w = scale * q, or scale * (q - zero_point), or scale * (q + half)
+ minimum. A byte of four-bit weights holds output row 2i in its low half and row 2i + 1 in its high half, of
one input column (`pack_int4_in_uint8` in nvidia-modelopt 0.47).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.tensor_files import TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import Bits, QuantizedTensor
from edgellm_buildhost.quantization.layer import Fp8Tensor, Int8Tensor, Linear

FP8_TYPE = np.dtype(ml_dtypes.float8_e4m3fn)
W4, W8_ROWS, W8A8, FP8 = "W4A16_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "FP8"
W4_ZERO_POINT, W4_MINIMUM = "EDGELLM_W4_ZERO_POINT", "EDGELLM_W4_MINIMUM"
W8, W8_ZERO_POINT, W8_MINIMUM = "EDGELLM_W8", "EDGELLM_W8_ZERO_POINT", "EDGELLM_W8_MINIMUM"
ALGORITHMS = (W4, W8_ROWS, W8A8, FP8, W4_ZERO_POINT, W4_MINIMUM, W8, W8_ZERO_POINT, W8_MINIMUM)
_HALF: Mapping[Bits, int] = {4: 8, 8: 128}
TypeAndShape = tuple[np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """How a linear is stored; None as group size means one scale for a row, or for all."""

    algorithm: str
    group_size: int | None = None


def encode(linear: QuantizedTensor | Int8Tensor | Fp8Tensor) -> dict[str, NDArray[Any]]:
    """The tensors of a linear by the last part of their name; raises ValueError for one that has no form."""
    if isinstance(linear, Int8Tensor):
        scales, codes = _positive(linear.scales), np.where(linear.scales[:, None] == 0, 0, linear.codes)
        return {
            "weight": codes.astype(np.int8),
            "weight_scale": scales,
            "input_scale": _scalar(linear.input_scale),
        }
    if isinstance(linear, Fp8Tensor):
        return {
            "weight": np.asarray(linear.values, FP8_TYPE),
            "weight_scale": _scalar(linear.scale),
            "input_scale": _scalar(linear.input_scale),
        }
    return _encode_grouped(linear)


def form_of(tensors: Mapping[str, TypeAndShape]) -> Form | None:
    """The form of a linear by what its tensors are, named as by `encode`; None for floats."""
    kind, shape = tensors["weight"]
    if "weight_scale" not in tensors:
        return None
    scale_shape = tensors["weight_scale"][1]
    if kind == FP8_TYPE:
        return Form(FP8)
    if len(scale_shape) < 2:
        return Form(W8A8 if "input_scale" in tensors else W8_ROWS)
    bits: Bits = 4 if kind == np.uint8 else 8
    extra = "zero" if "weight_zero_point" in tensors else "minimum" if "weight_minimum" in tensors else ""
    names = {4: {"": W4, "zero": W4_ZERO_POINT, "minimum": W4_MINIMUM}}
    names[8] = {"": W8, "zero": W8_ZERO_POINT, "minimum": W8_MINIMUM}
    return Form(names[bits][extra], shape[2] if len(shape) > 2 else shape[1] // scale_shape[1])


def decode(files: TensorFiles, module: str, shape: tuple[int, int], form: Form) -> Linear:
    """The linear `module` of that shape `[out, in]`, stored in that form; raises BuildError."""
    rows, columns = shape

    def floats(part: str, of: tuple[int, ...]) -> NDArray[np.float32]:
        return files.floats(f"{module}.{part}", of)

    def weight(kind: type, of: tuple[int, ...] = shape) -> NDArray[Any]:
        return files.read(f"{module}.weight", [np.dtype(kind)], of)

    if form.algorithm == FP8:
        values = files.read(f"{module}.weight", [FP8_TYPE], shape)
        return Fp8Tensor(
            np.array(values), _one(files, module, "weight_scale"), _one(files, module, "input_scale")
        )
    if form.algorithm == W8A8:
        input_scale = _one(files, module, "input_scale")
        return Int8Tensor(np.array(weight(np.int8)), floats("weight_scale", (rows,)), input_scale)
    if form.algorithm == W8_ROWS:
        scales = floats("weight_scale", (rows,))[:, None]
        return QuantizedTensor(8, columns, _unsigned(weight(np.int8))[:, None, :], scales)
    group_size = form.group_size or columns
    grouped = (rows, columns // group_size)
    if form.algorithm in {W4, W4_ZERO_POINT, W4_MINIMUM}:
        if rows % 2:
            raise BuildError(
                f"{files.directory}: {module} has {rows} output rows, and a byte holds two",
                "build from the unquantized checkpoint",
            )
        codes = unpack_rows(weight(np.uint8, (rows // 2, columns))).reshape(*grouped, group_size)
        return _grouped(files, module, codes, form)
    return _grouped(files, module, _unsigned(weight(np.int8, (*grouped, group_size))), form)


def pack_rows(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Unsigned 4-bit codes `[out, in]` to signed ones, two rows a byte: uint8 `[out / 2, in]`."""
    signed = codes ^ 8
    return np.ascontiguousarray(signed[0::2] | (signed[1::2] << 4))


def unpack_rows(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What `pack_rows` packed."""
    codes = np.empty((2 * packed.shape[0], packed.shape[1]), np.uint8)
    codes[0::2], codes[1::2] = (packed & 0xF) ^ 8, (packed >> 4) ^ 8
    return codes


def _encode_grouped(linear: QuantizedTensor) -> dict[str, NDArray[Any]]:
    if linear.columns % linear.group_size:
        raise ValueError(f"groups of {linear.group_size} do not divide {linear.columns} inputs")
    if linear.bits == 4 and linear.rows % 2:
        raise ValueError(f"{linear.rows} output rows cannot be packed in pairs")
    scales, codes = np.asarray(linear.scales, np.float32), linear.codes
    symmetric = linear.zero_points is None and linear.minima is None
    if symmetric:
        if (scales < 0).any():
            raise ValueError("a symmetric grid with negative scales has no form in a checkpoint")
        codes = np.where(scales[..., None] == 0, np.uint8(_HALF[linear.bits]), codes)
        scales = _positive(scales)
    if linear.bits == 4:
        tensors: dict[str, NDArray[Any]] = {"weight": pack_rows(codes.reshape(linear.rows, linear.columns))}
    else:
        tensors = {"weight": (codes ^ np.uint8(0x80)).view(np.int8)}
    tensors["weight_scale"] = scales
    if linear.bits == 8 and symmetric and linear.groups == 1:
        tensors = {"weight": tensors["weight"][:, 0], "weight_scale": scales[:, 0]}
    if linear.zero_points is not None:
        tensors["weight_zero_point"] = (linear.zero_points.astype(np.int16) - _HALF[linear.bits]).astype(
            np.int8
        )
    if linear.minima is not None:
        tensors["weight_minimum"] = np.asarray(linear.minima, np.float32)
    return tensors


def _grouped(files: TensorFiles, module: str, codes: NDArray[np.uint8], form: Form) -> QuantizedTensor:
    rows, groups, group_size = codes.shape
    bits: Bits = 4 if form.algorithm in {W4, W4_ZERO_POINT, W4_MINIMUM} else 8
    zero_points = minima = None
    if form.algorithm in {W4_ZERO_POINT, W8_ZERO_POINT}:
        stored = files.read(f"{module}.weight_zero_point", [np.dtype(np.int8)], (rows, groups))
        zero_points = (stored.astype(np.int16) + _HALF[bits]).astype(np.uint8)
    if form.algorithm in {W4_MINIMUM, W8_MINIMUM}:
        minima = files.floats(f"{module}.weight_minimum", (rows, groups))
    scales = files.floats(f"{module}.weight_scale", (rows, groups))
    return QuantizedTensor(bits, groups * group_size, codes, scales, zero_points, minima)


def _unsigned(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    return np.asarray(np.asarray(values).view(np.uint8) ^ np.uint8(0x80), np.uint8)


def _one(files: TensorFiles, module: str, part: str) -> float:
    """A scale for the whole matrix; some exporters write it as a vector of one."""
    shape = files.stored(f"{module}.{part}").shape
    return float(files.floats(f"{module}.{part}", shape if shape == (1,) else ()).reshape(()))


def _scalar(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def _positive(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Loaders divide by scales: those of rows or groups that are all zero become 1, as in ModelOpt."""
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)
