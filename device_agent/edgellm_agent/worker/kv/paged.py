"""KV memory of a CPU: contiguous addresses per sequence, backed by pages only where tokens are.

Each layer has a key and a value tensor of shape [slots, kv_heads, capacity, head_dim] in anonymous memory
that is reserved but not taken. A page becomes real when a token is written into it. Slots change places by
page table, without a copy.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence

from edgellm_agent.runtimes.base import KvSpace, KvTensor
from edgellm_agent.worker.kv.base import KvGeometry, Place

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

_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MREMAP_DONTUNMAP = 4
# The old addresses stay ours: another thread could be given a hole that is left there. Linux 5.7, JetPack 5.
_MOVE_PAGES = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
_MADV_DONTNEED = 4
# Huge pages would make 41 tokens cost 128 MiB.
_MADV_NOHUGEPAGE = 15
_MAP_FAILED = ctypes.c_void_p(-1).value


class PagedKvMemory:
    """One space of many slots; a slot takes pages as its tokens come.

    One slot more than `slots` is mapped, so that two can change places. Raises MemoryError when the kernel
    refuses the address space.
    """

    def __init__(self, geometry: KvGeometry, slots: int, context_tokens: int) -> None:
        self.geometry = geometry
        token_bytes = geometry.head_dim * geometry.item_bytes
        # The smallest run of tokens that fills whole pages in every head's region.
        self.tokens_per_page = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes)
        self._granule_bytes = self.tokens_per_page * geometry.bytes_per_token
        self._capacity = -(-context_tokens // self.tokens_per_page) * self.tokens_per_page
        self._head_bytes = self._capacity * token_bytes
        self._stride = geometry.kv_heads * self._head_bytes
        self._slots = slots + 1
        self._free = set(range(self._slots))
        self._slot_of: dict[int, int] = {}
        self._next_handle = 0
        self._bases: list[int] = []
        try:
            for _ in range(2 * geometry.layers):
                self._bases.append(_map(self._slots * self._stride))
        except BaseException:
            self.close()
            raise

    @property
    def spaces(self) -> tuple[KvSpace, ...]:
        """One space."""
        return (KvSpace(self._tensors(self._bases[0::2]), self._tensors(self._bases[1::2])),)

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence: the context, rounded up to whole pages."""
        return self._capacity

    def bytes_for(self, tokens: int) -> int:
        """Whole pages in every head's region."""
        return -(-tokens // self.tokens_per_page) * self._granule_bytes

    def allocate(self, tokens: int) -> int | None:
        """Any slot will do; one stays free for `arrange`."""
        if len(self._free) <= 1 or tokens > self._capacity:
            return None
        self._next_handle += 1
        self._slot_of[self._next_handle] = min(self._free)
        self._free.remove(self._slot_of[self._next_handle])
        return self._next_handle

    def extend(self, handle: int, held_tokens: int, tokens: int) -> bool:  # noqa: ARG002 - nothing moves
        """Pages come by themselves."""
        if handle not in self._slot_of:
            raise KeyError(handle)
        return tokens <= self._capacity

    def trim(self, handle: int, tokens: int) -> None:
        """Gives the pages behind the last token's back to the kernel."""
        kept = -(-tokens // self.tokens_per_page) * self.tokens_per_page
        offset = kept * self.geometry.head_dim * self.geometry.item_bytes
        if offset == 0:
            self._release(self._slot_of[handle] * self._stride, self._stride)
        elif offset < self._head_bytes:
            for head in range(self.geometry.kv_heads):
                start = self._slot_of[handle] * self._stride + head * self._head_bytes + offset
                self._release(start, self._head_bytes - offset)

    def free(self, handle: int) -> None:
        """Gives the pages back; the slot reads as zeros afterwards."""
        self.trim(handle, 0)
        self._free.add(self._slot_of.pop(handle))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies whole tokens, head by head; cheaper by far than computing them again."""
        length = tokens * self.geometry.head_dim * self.geometry.item_bytes
        for base in self._bases:
            for head in range(self.geometry.kv_heads):
                offset = base + head * self._head_bytes
                ctypes.memmove(
                    offset + self._slot_of[target] * self._stride,
                    offset + self._slot_of[source] * self._stride,
                    length,
                )

    def place(self, handle: int) -> Place:
        """Its slot in the only space."""
        return Place(0, self._slot_of[handle])

    def arrange(self, handles: Sequence[int]) -> list[list[int]]:
        """Moves these into the first slots: one group."""
        wanted = set(handles)
        by_slot = {slot: handle for handle, slot in self._slot_of.items()}
        outside = [h for h in wanted if self._slot_of[h] >= len(wanted)]
        # Free targets first: then every slot that is still free lies behind the group.
        targets = [slot for slot in range(len(wanted)) if by_slot.get(slot) not in wanted]
        for target in sorted(targets, key=lambda slot: slot in by_slot):
            holder = by_slot.get(target)
            if holder is not None:
                self._move(holder, max(self._free))
            self._move(outside.pop(), target)
        return [sorted(wanted, key=lambda handle: self._slot_of[handle])] if wanted else []

    def close(self) -> None:
        """Unmaps everything."""
        while self._bases:
            _libc.munmap(self._bases.pop(), self._slots * self._stride)

    def _move(self, handle: int, target: int) -> None:
        source = self._slot_of[handle]
        for base in self._bases:
            old, new = base + source * self._stride, base + target * self._stride
            moved = _libc.mremap(old, self._stride, self._stride, _MOVE_PAGES, new)
            if moved in (None, _MAP_FAILED):
                raise OSError(ctypes.get_errno(), f"mremap: {os.strerror(ctypes.get_errno())}")
        self._slot_of[handle] = target
        self._free.discard(target)
        self._free.add(source)

    def _release(self, offset: int, length: int) -> None:
        for base in self._bases:
            if _libc.madvise(base + offset, length, _MADV_DONTNEED) != 0:
                raise OSError(ctypes.get_errno(), f"madvise: {os.strerror(ctypes.get_errno())}")

    def _tensors(self, bases: list[int]) -> tuple[KvTensor, ...]:
        shape = (self._slots, self.geometry.kv_heads, self._capacity, self.geometry.head_dim)
        return tuple(KvTensor(base, shape, self._stride) for base in bases)


def _map(length: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    got: int | None = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if got is None or got == _MAP_FAILED:
        raise MemoryError(f"mmap of {length} bytes for the KV cache: {os.strerror(ctypes.get_errno())}")
    # A kernel without transparent huge pages refuses the advice, and needs none.
    _libc.madvise(got, length, _MADV_NOHUGEPAGE)
    return got
