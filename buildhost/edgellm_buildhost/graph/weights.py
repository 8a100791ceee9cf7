"""Weight shards: tensors appended to files as they are made, so that memory follows one tensor and not
the model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Self

SHARD_BYTES = 256 * 1024 * 1024
PAGE_BYTES = 4096  # a tensor that begins on a page can be mapped by itself
_LINE_BYTES = 64  # enough for one that is smaller than a page


@dataclass(frozen=True)
class Region:
    """Where a tensor lies: a shard's file name, and bytes from its start."""

    file_name: str
    offset: int
    length: int


class WeightShards:
    """Appends tensors to `weights-00000.bin`, `weights-00001.bin`, ... in a directory.

    The caller closes it (it is a context manager); what was written before stays readable through the
    regions.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write below `directory`, which exists; a shard grows to at most `shard_bytes` unless one
        tensor is larger.
        """
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._count = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """The shards themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the last file."""
        self._close()

    def append(self, array: NDArray[Any]) -> Region:
        """Write the array's bytes, C order and little-endian, and say where they are."""
        data = np.ascontiguousarray(array)
        alignment = PAGE_BYTES if data.nbytes >= PAGE_BYTES else _LINE_BYTES
        file = self._shard_for(data.nbytes + alignment)
        padding = -file.tell() % alignment
        file.write(bytes(padding))
        region = Region(f"weights-{self._count - 1:05d}.bin", file.tell(), data.nbytes)
        file.write(data.data.cast("B"))
        return region

    def tensor(
        self, name: str, region: Region, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        """The region as a named tensor of the graph; two tensors may share one region."""
        return ir.ExternalTensor(
            location=region.file_name,
            offset=region.offset,
            length=region.length,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self._directory,
        )

    def _shard_for(self, nbytes: int) -> BinaryIO:
        if self._file is not None and self._file.tell() and self._file.tell() + nbytes > self._shard_bytes:
            self._close()
        if self._file is None:
            path = self._directory / f"weights-{self._count:05d}.bin"
            self._file = path.open("wb")
            self._count += 1
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
