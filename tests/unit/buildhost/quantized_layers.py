"""Layers in every form that a checkpoint can hold, made of a tiny model's own weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import LINEARS, layer_tensor
from edgellm_buildhost.checkpoint import Checkpoint, open_checkpoint
from edgellm_buildhost.quantization.grid import Grid, QuantizedTensor, quantize
from edgellm_buildhost.quantization.layer import Fp8Tensor, Int8Tensor, Linear, QuantizedLayer
from edgellm_buildhost.quantized import CheckpointWriter, KvCacheScales

Form = Callable[[NDArray[np.float32]], Linear]


def symmetric(bits: int, group_size: int = 32) -> Form:
    def form(weight: NDArray[np.float32]) -> QuantizedTensor:
        half, groups = 1 << (bits - 1), weight.reshape(weight.shape[0], -1, group_size)
        scales = (np.abs(groups).max(axis=2) / (half - 1)).astype(np.float32)
        codes = np.rint(groups / np.where(scales == 0, 1, scales)[..., None]) + half
        return QuantizedTensor(4 if bits == 4 else 8, weight.shape[1], codes.astype(np.uint8), scales)

    return form


def on_grid(bits: int, grid: Grid) -> Form:
    return lambda weight: quantize(weight, 4 if bits == 4 else 8, 32, grid)


def int8_products(weight: NDArray[np.float32]) -> Int8Tensor:
    scales = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
    return Int8Tensor(np.rint(weight / scales[:, None]).astype(np.int8), scales, 0.0625)


def fp8(weight: NDArray[np.float32]) -> Fp8Tensor:
    return Fp8Tensor((weight / 0.03125).astype(ml_dtypes.float8_e4m3fn), 0.03125, 0.5)


def as_it_is(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return weight


FORMS: dict[str, Form] = {
    "int4": symmetric(4),
    "int8": symmetric(8),
    "int8 by rows": lambda weight: symmetric(8, weight.shape[1])(weight),
    "int4 zero points": on_grid(4, Grid.INTEGER_ZERO),
    "int8 zero points": on_grid(8, Grid.INTEGER_ZERO),
    "int4 minima": on_grid(4, Grid.FLOAT_MINIMUM),
    "int8 minima": on_grid(8, Grid.FLOAT_MINIMUM),
    "int8 products": int8_products,
    "fp8": fp8,
    "floats": as_it_is,
}


def floats(linear: Linear) -> NDArray[np.float32]:
    return linear if isinstance(linear, np.ndarray) else linear.dequantize()


def layer_of(source: Checkpoint, index: int, form: Form | dict[str, Form]) -> QuantizedLayer:
    """A layer with all linears in one form, or each in its own."""
    by_part = form if isinstance(form, dict) else dict.fromkeys(LINEARS, form)
    linears = {part: by_part[part](source.tensor(layer_tensor(index, part))) for part in LINEARS}
    vectors = {part: source.tensor(f"model.layers.{index}.{part}") for part in source.architecture.vectors()}
    return QuantizedLayer(linears, vectors)


def write(
    directory: Path,
    source: Path,
    form: Form | dict[str, Form],
    *,
    key: str = "key",
    scheme: str = "as the test says",
    kv_scales: KvCacheScales | None = None,
) -> Path:
    """The whole of a checkpoint, quantized."""
    checkpoint = open_checkpoint(source)
    with CheckpointWriter(directory, checkpoint, key=key, scheme=scheme, kv_scales=kv_scales) as writer:
        for index in range(writer.done, checkpoint.architecture.layers):
            writer.add_layer(index, layer_of(checkpoint, index, form))
        return writer.finish()
