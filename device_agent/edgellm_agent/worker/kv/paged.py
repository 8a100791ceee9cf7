"""Host memory of the KV cache: contiguous addresses per sequence, backed by pages only where tokens are.

Each layer has a key and a value tensor of shape [slots, kv_heads, capacity, head_dim] in anonymous memory
that is reserved but not taken. A page becomes real when a token is written into it, and is given back with
`clear`. `move` hands a slot's pages to another slot by page table, without a copy.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from dataclasses import dataclass

from edgellm_agent.runtimes.base import KvTensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MADV_DONTNEED = 4
# Huge pages would make 41 tokens cost 128 MiB.
_MADV_NOHUGEPAGE = 15
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class KvGeometry:
    """Shape of the cache of one model."""

    layers: int
    kv_heads: int
    head_dim: int
    item_bytes: int

    @property
    def tokens_per_page(self) -> int:
        """Smallest run of tokens that fills whole pages in every head's region."""
        token_bytes = self.head_dim * self.item_bytes
        return mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes)

    @property
    def granule_bytes(self) -> int:
        """Memory that `tokens_per_page` tokens of one sequence take in all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.tokens_per_page * self.head_dim * self.item_bytes

    def bytes_for(self, tokens: int) -> int:
        """Memory that a sequence of so many tokens takes: whole pages."""
        return -(-tokens // self.tokens_per_page) * self.granule_bytes


class KvMemory:
    """The mapped tensors. Raises MemoryError when the kernel refuses the address space."""

    def __init__(self, geometry: KvGeometry, slots: int, context_tokens: int) -> None:
        self.geometry = geometry
        self.slots = slots
        page = geometry.tokens_per_page
        self.capacity = -(-context_tokens // page) * page
        self._stride = geometry.kv_heads * self.capacity * geometry.head_dim * geometry.item_bytes
        self._bases: list[int] = []
        try:
            for _ in range(2 * geometry.layers):
                self._bases.append(_map(None, slots * self._stride))
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> tuple[KvTensor, ...]:
        """Key tensors by layer."""
        return self._tensors(self._bases[0::2])

    @property
    def values(self) -> tuple[KvTensor, ...]:
        """Value tensors by layer."""
        return self._tensors(self._bases[1::2])

    def clear(self, slot: int) -> None:
        """Gives the pages of a slot back; it reads as zeros afterwards."""
        for base in self._bases:
            _check(_libc.madvise(base + slot * self._stride, self._stride, _MADV_DONTNEED), "madvise")

    def move(self, source: int, target: int) -> None:
        """Moves the pages of `source` to `target`, whose own content is lost.

        `source` is empty afterwards.
        """
        for base in self._bases:
            old, new = base + source * self._stride, base + target * self._stride
            moved = _libc.mremap(old, self._stride, self._stride, _MREMAP_MAYMOVE | _MREMAP_FIXED, new)
            if moved in (None, _MAP_FAILED):
                raise OSError(ctypes.get_errno(), f"mremap: {os.strerror(ctypes.get_errno())}")
            # The hole that it leaves must be ours again before anybody else maps something there.
            _map(old, self._stride)

    def close(self) -> None:
        """Unmaps everything; nobody may touch the tensors afterwards."""
        while self._bases:
            _libc.munmap(self._bases.pop(), self.slots * self._stride)

    def _tensors(self, bases: list[int]) -> tuple[KvTensor, ...]:
        geometry = self.geometry
        shape = (self.slots, geometry.kv_heads, self.capacity, geometry.head_dim)
        return tuple(KvTensor(base, shape, self._stride) for base in bases)


def _map(address: int | None, length: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if address else 0)
    got: int | None = _libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if got is None or got == _MAP_FAILED:
        raise MemoryError(f"mmap of {length} bytes for the KV cache: {os.strerror(ctypes.get_errno())}")
    # A kernel without transparent huge pages refuses the advice, and needs none.
    _libc.madvise(got, length, _MADV_NOHUGEPAGE)
    return got


def _check(result: int, call: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")
