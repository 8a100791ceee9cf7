"""The tensors of a directory: safetensors files with or without an index, mapped and not read into memory.

The `safetensors` package checks the files; it hands out no bfloat16 and no FP8 to numpy, so bytes are mapped
here. The layout is https://github.com/huggingface/safetensors#format: u64 length of the header, JSON header,
data without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgellm_buildhost.checkpoint.base import check_finite, wrong_shape
from edgellm_buildhost.checkpoint.settings import FETCH_AGAIN, Settings
from edgellm_buildhost.errors import BuildError

INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_TYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
TYPE_NAMES = {kind: name for name, kind in _TYPES.items()}
FLOATS = tuple(_TYPES[name] for name in ("F16", "BF16", "F32", "F64"))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file, and what it is; `offset` in bytes from the start of the file."""

    path: Path
    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def kind(self) -> np.dtype[Any]:
        """Its type; raises BuildError for one that numpy and ml_dtypes do not have."""
        if self.type_name not in _TYPES:
            raise BuildError(
                f"{self.path}: tensor {self.name} has type {self.type_name}, which cannot be read",
                f"types that can: {', '.join(_TYPES)}; choose another checkpoint of the model",
            )
        return _TYPES[self.type_name]


class TensorFiles:
    """The tensors of a checkpoint by name. Files are mapped: what is not used is not read."""

    def __init__(self, directory: Path) -> None:
        """Read the headers of all files; raises BuildError for one that is missing or damaged."""
        self.directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        file_of = _index(directory)
        for file_name in sorted(set(file_of.values())) or [_SINGLE_FILE]:
            for name, tensor in read_header(directory / file_name).items():
                if file_of.get(name, file_name) == file_name:
                    self._tensors[name] = tensor
        for name, file_name in file_of.items():
            if name not in self._tensors:
                raise BuildError(
                    f"{directory / file_name}: no tensor {name}, {INDEX_FILE} says it is there", FETCH_AGAIN
                )
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._tensors

    def stored(self, name: str) -> StoredTensor:
        """What the tensor is; raises BuildError when it is missing."""
        if name not in self._tensors:
            raise BuildError(f"{self.directory}: no tensor {name} in the safetensors files", FETCH_AGAIN)
        return self._tensors[name]

    def check_types(self) -> None:
        """Raises BuildError if there is a tensor of a type that cannot be read."""
        for tensor in self._tensors.values():
            _ = tensor.kind

    def read(self, name: str, kinds: Sequence[np.dtype[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
        """The mapped tensor, read-only, in one of these types and of that shape; raises BuildError."""
        stored = self.stored(name)
        if stored.kind not in kinds:
            wanted = " or ".join(TYPE_NAMES[kind] for kind in kinds)
            raise BuildError(
                f"{stored.path}: tensor {name} has type {stored.type_name}, it should be {wanted}",
                "the layout is not the one that the configuration names: " + FETCH_AGAIN,
            )
        if stored.shape != shape:
            raise wrong_shape(str(stored.path), name, stored.shape, shape)
        try:
            if not stored.shape or 0 in stored.shape:
                data = np.fromfile(stored.path, stored.kind, int(np.prod(shape)), offset=stored.offset)
                return data.reshape(shape)
            return np.memmap(stored.path, stored.kind, "r", stored.offset, stored.shape)
        except (OSError, ValueError) as error:
            raise BuildError(f"{stored.path}: cannot read tensor {name}: {error}", FETCH_AGAIN) from error

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The tensor as float32, every value finite; raises BuildError."""
        values = np.asarray(self.read(name, FLOATS, shape), np.float32)
        check_finite(str(self.stored(name).path), name, values)
        return values


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file; raises BuildError for a file that is missing, damaged or cut short."""
    try:
        with safe_open(path, "np"):  # checks lengths, gaps and offsets against the size of the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise BuildError(f"{path}: damaged or cut short: {error}", FETCH_AGAIN) from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def _index(directory: Path) -> dict[str, str]:
    """The file that holds each tensor, by the index; empty where there is but one file.

    Every file that is named must be there.
    """
    index_path = directory / INDEX_FILE
    if not index_path.exists():
        if (directory / _SINGLE_FILE).is_file():
            return {}
        raise BuildError(
            f"{directory}: no {_SINGLE_FILE} and no {INDEX_FILE}",
            "give a directory with safetensors weights (pickled .bin files are not read)",
        )
    weight_map = Settings.read(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BuildError(f"{index_path}: weight_map is missing", FETCH_AGAIN)
    for file_name in sorted({str(value) for value in weight_map.values()}):
        if Path(file_name).name != file_name:
            raise BuildError(f"{index_path}: shard {file_name!r} lies outside the directory", FETCH_AGAIN)
        if not (directory / file_name).is_file():
            raise BuildError(f"{directory / file_name}: shard missing, {INDEX_FILE} names it", FETCH_AGAIN)
    return {str(name): str(file_name) for name, file_name in weight_map.items()}
