"""Reads and writes KV memory as a kernel does: by address."""

import ctypes

import numpy as np

from edgellm_agent.runtimes.base import KvTensor
from edgellm_agent.worker.kv.base import KvMemory


def slot_view(tensor: KvTensor, slot: int) -> np.ndarray:
    """[kv_heads, capacity, head_dim] of one slot, writable."""
    n = tensor.slot_stride_bytes // 4
    raw = (ctypes.c_float * n).from_address(tensor.address + slot * tensor.slot_stride_bytes)
    return np.ctypeslib.as_array(raw).reshape(tensor.shape[1:])


def views(memory: KvMemory, handle: int) -> list[np.ndarray]:
    """The handle's slot in every tensor, keys before values."""
    place = memory.place(handle)
    space = memory.spaces[place.space]
    return [slot_view(tensor, place.slot) for tensor in space.keys + space.values]


def write(memory: KvMemory, handle: int, first: int, marks: list[int]) -> None:
    """Writes tokens from `first` on; each has its own figure in every tensor, head and element."""
    for view, expected in zip(views(memory, handle), _figures(memory, handle, marks), strict=True):
        view[:, first : first + len(marks)] = expected


def holds(memory: KvMemory, handle: int, marks: list[int]) -> bool:
    """Whether its first tokens are those that were written."""
    return all(
        np.array_equal(view[:, : len(marks)], expected)
        for view, expected in zip(views(memory, handle), _figures(memory, handle, marks), strict=True)
    )


def _figures(memory: KvMemory, handle: int, marks: list[int]) -> list[np.ndarray]:
    # Sixteenths below 2**20 are exact in float32.
    figures = []
    for i, view in enumerate(views(memory, handle)):
        heads, _, dim = view.shape
        where = 100 * i + 10 * np.arange(heads)[:, None, None] + np.arange(dim) % 16 / 16
        figures.append((1000 * np.array(marks)[None, :, None] + where).astype(np.float32))
    return figures
