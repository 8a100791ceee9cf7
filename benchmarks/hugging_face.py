"""Writes a Llama-shaped model as a Hugging Face directory, one shard at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgellm_buildhost.architecture import Architecture, tensor_shapes
from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.checkpoint.hf import CONFIG_FILE
from edgellm_buildhost.quantized.metadata import made_config, write_json, write_tokenizer

_OUTSIDE = "outside"


def shards(shape: Architecture) -> list[list[str]]:
    """The names of all tensors, a list for each layer and one for what is outside of the layers."""
    parts: dict[str, list[str]] = {}
    for name in tensor_shapes(shape):
        layer = name.split(".")[2] if name.startswith("model.layers.") else _OUTSIDE
        parts.setdefault(layer, []).append(name)
    outside = parts.pop(_OUTSIDE)
    return [*parts.values(), outside]


def write_weights(directory: Path, parts: Iterable[Mapping[str, NDArray[np.generic]]], count: int) -> int:
    """Write `count` safetensors files and their index, and return the bytes of all tensors.

    The parts may be made as they are asked for: one at a time is held.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(dict(tensors), directory / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return total


def write_settings(directory: Path, shape: Architecture, tokenizer: TokenizerFiles, dtype: str) -> None:
    """Write config.json and the tokenizer; raises BuildError for what a config.json cannot say."""
    write_json(
        directory / CONFIG_FILE, made_config(directory.name, shape, tokenizer) | {"torch_dtype": dtype}
    )
    write_tokenizer(directory, tokenizer)
