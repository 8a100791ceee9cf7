"""Writes safetensors files, tensor by tensor in pieces, in all types that checkpoints use.

The `safetensors` package writes only what is held in memory at once, and takes no bfloat16 from numpy. The
layout is https://github.com/huggingface/safetensors#format: u64 length of the header, JSON header, data
without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.tensor_files import TYPE_NAMES

_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: `pieces` makes its values, in order, in arrays of that type."""

    name: str
    kind: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]

    @property
    def length(self) -> int:
        """Bytes in the file."""
        return self.kind.itemsize * int(np.prod(self.shape, dtype=np.int64))


def whole(name: str, array: NDArray[Any]) -> Pending:
    """A tensor that is in memory."""
    return Pending(name, array.dtype, array.shape, lambda: iter((array,)))


def write_tensors(path: Path, tensors: Sequence[Pending]) -> None:
    """Write a file that appears under its name only when it is whole and on the disk.

    Equal tensors give equal bytes. Raises OSError; then nothing of the file is left.
    """
    # The widest types first, as the package does: so each begins at a multiple of its size.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.kind.itemsize, tensor.name))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(_header(ordered))
            for tensor in ordered:
                _write_pieces(file, tensor)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(tensors: Sequence[Pending]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.length
        entries[tensor.name] = {
            "dtype": TYPE_NAMES[tensor.kind],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_pieces(file: BinaryIO, tensor: Pending) -> None:
    begin = file.tell()
    for piece in tensor.pieces():
        if piece.dtype != tensor.kind:
            raise TypeError(f"{tensor.name}: a piece of type {piece.dtype}, not {tensor.kind}")
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    if file.tell() - begin != tensor.length:
        raise ValueError(f"{tensor.name}: {file.tell() - begin} bytes came, {tensor.length} were announced")
