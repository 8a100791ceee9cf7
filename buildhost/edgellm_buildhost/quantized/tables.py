"""Embedding and head: rounded to 16 bits a few rows at a time; memory does not follow the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import EMBEDDING, HEAD, row_ranges, tensor_shapes
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.quantized.tensor_writer import Pending

FLOAT16: np.dtype[Any] = np.dtype(np.float16)
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_CHUNK_BYTES = 16 << 20  # as float32
_MOST_FLOAT16 = float(np.finfo(np.float16).max)


def table_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Our names of the tables that the checkpoint has."""
    return (EMBEDDING,) if checkpoint.architecture.tied_embedding else (EMBEDDING, HEAD)


def table_type(checkpoint: Checkpoint, published: str | None) -> np.dtype[Any]:
    """bfloat16 where the source has it, or holds values that float16 cannot; else float16."""
    if published == "bfloat16":
        return BFLOAT16
    for name in table_names(checkpoint):
        if any(float(np.abs(rows).max()) > _MOST_FLOAT16 for rows in _chunks(checkpoint, name)):
            return BFLOAT16
    return FLOAT16


def table(checkpoint: Checkpoint, name: str, stored_name: str, kind: np.dtype[Any]) -> Pending:
    """One table, to be written in that type; its rows are read when they are written."""

    def pieces() -> Iterator[NDArray[Any]]:
        return (rows.astype(kind) for rows in _chunks(checkpoint, name))

    return Pending(stored_name, kind, tensor_shapes(checkpoint.architecture)[name], pieces)


def smallest_exact(values: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    """The same values in that 16-bit type where it holds them all, else as they are."""
    with np.errstate(over="ignore"):
        rounded = values.astype(kind)
    return rounded if np.array_equal(rounded.astype(np.float32), values) else values


def sixteen_bits(values: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    """The values rounded to that 16-bit type, or as they are where it does not reach so far."""
    with np.errstate(over="ignore"):
        rounded = values.astype(kind)
    return rounded if np.isfinite(rounded.astype(np.float32)).all() else values


def _chunks(checkpoint: Checkpoint, name: str) -> Iterator[NDArray[np.float32]]:
    ranges = row_ranges(checkpoint.architecture, name, _CHUNK_BYTES)
    return (checkpoint.rows(name, start, stop) for start, stop in ranges)
