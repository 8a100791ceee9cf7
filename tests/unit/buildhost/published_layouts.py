"""Writes one matrix of integers in the layouts of others, by their published descriptions, word by word.

It shares no code with the readers: every integer is placed by a loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tests.support.tiny_models import make_tiny_hf

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Integers:
    """w = (codes - zeros) * scales; codes `[out, in]`, zeros and scales `[out, groups]`."""

    codes: NDArray[np.int64]
    zeros: NDArray[np.int64]
    scales: NDArray[np.float16]

    def weight(self) -> NDArray[np.float32]:
        size = self.codes.shape[1] // self.zeros.shape[1]
        zeros, scales = (np.repeat(array, size, axis=1) for array in (self.zeros, self.scales))
        return ((self.codes - zeros) * scales.astype(np.float32)).astype(np.float32)


def some_integers(
    shape: tuple[int, int], group_size: int, seed: int, bits: int = 4, zero: int | None = None
) -> Integers:
    """Any integers of that width; all zero points are `zero` if it is given."""
    rng = np.random.default_rng(seed)
    rows, groups = shape[0], shape[1] // group_size
    zeros = rng.integers(0, 1 << bits, (rows, groups)) if zero is None else np.full((rows, groups), zero)
    scales = rng.uniform(0.001, 0.02, (rows, groups)).astype(np.float16)
    return Integers(rng.integers(0, 1 << bits, shape), zeros, scales)


def pack(values: NDArray[np.int64], bits: int, places: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """Rows of integers, as many neighbours a word as fit; `places[i]` is the neighbour in the i-th slot."""
    slots = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // slots), np.uint32)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for slot in range(slots):
                neighbour = slot if places is None else places[slot]
                words[row, word] |= np.uint32(int(values[row, word * slots + neighbour]) << (bits * slot))
    return words.view(np.int32)


def awq_tensors(matrix: Integers) -> dict[str, NDArray[Any]]:
    return {
        "qweight": pack(matrix.codes.T, 4, AWQ_PLACES),
        "qzeros": pack(matrix.zeros.T, 4, AWQ_PLACES),
        "scales": np.ascontiguousarray(matrix.scales.T),
    }


def gptq_tensors(matrix: Integers, bits: int = 4, version: int = 1) -> dict[str, NDArray[Any]]:
    stored = (matrix.zeros - (1 if version == 1 else 0)) % (1 << bits)
    columns, groups = matrix.codes.shape[1], matrix.zeros.shape[1]
    return {
        "qweight": np.ascontiguousarray(pack(matrix.codes, bits).T),
        "qzeros": pack(stored.T, bits),
        "scales": np.ascontiguousarray(matrix.scales.T),
        "g_idx": (np.arange(columns) // (columns // groups)).astype(np.int32),
    }


def compressed_tensors(
    matrix: Integers, bits: int = 4, *, symmetric: bool = False
) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {
        "weight_packed": pack(matrix.codes, bits),
        "weight_scale": matrix.scales,
        "weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(matrix.zeros.T, bits).T)
    return tensors


def quantized_directory(
    directory: Path,
    tensors_of: Callable[[str, tuple[int, int]], dict[str, NDArray[Any]]],
    config: dict[str, Any],
) -> Path:
    """The Hugging Face directory with every linear replaced by what `tensors_of` (module, shape) makes."""
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        made = tensors_of(module, (weight.shape[0], weight.shape[1]))
        tensors |= {f"{module}.{part}": array for part, array in made.items()}
    save_file(tensors, directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return directory


AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": WEIGHTS}},
}
Maker = Callable[[Integers], dict[str, NDArray[Any]]]
LAYOUTS: dict[str, tuple[dict[str, Any], Maker]] = {
    "awq": (AWQ, awq_tensors),
    "gptq": (GPTQ, gptq_tensors),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda matrix: gptq_tensors(matrix, version=2)),
    "compressed-tensors": (COMPRESSED, compressed_tensors),
}


def with_weights(**changes: Any) -> dict[str, Any]:
    """The configuration of compressed-tensors with other figures of its weights."""
    group = {"targets": ["Linear"], "input_activations": None, "weights": WEIGHTS | changes}
    return COMPRESSED | {"config_groups": {"group_0": group}}


def made_of(
    directory: Path, config: dict[str, Any], maker: Maker, *, ffn: int = 128, **figures: Any
) -> tuple[Path, dict[str, Integers]]:
    """A checkpoint in that layout, and what is in each of its modules."""
    modules: dict[str, Integers] = {}

    def tensors_of(module: str, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
        size = figures.get("group_size", 32) or shape[1]
        modules[module] = some_integers(
            shape, size, len(modules), figures.get("bits", 4), zero=figures.get("zero")
        )
        return maker(modules[module])

    return quantized_directory(make_tiny_hf(directory, ffn=ffn), tensors_of, config), modules


def edit(directory: Path, **changes: Any) -> None:
    """Replace tensors, `__` standing for a dot; None removes one."""
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        named = {name.replace("__", "."): value for name, value in changes.items()}
        if named.keys() & tensors.keys():
            kept = {name: value for name, value in (tensors | named).items() if value is not None}
            save_file(kept, path)
