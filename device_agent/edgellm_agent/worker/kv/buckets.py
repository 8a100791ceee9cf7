"""KV memory of a device: slots of a few sizes, all taken at the start.

Device memory comes in pages of 2 MiB and has no addresses to spare, so a slot is backed in full from the
beginning. Slots are cut in a few capacities (`divide`); each capacity is a space with tensors of shape
[slots, kv_heads, capacity, head_dim]. A sequence that outgrows its slot moves up to a larger one, by a copy.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm_agent.runtimes.base import KvSpace, KvTensor
from edgellm_agent.worker.kv.base import KvGeometry, Place

SMALLEST_TOKENS = 512
# A move up copies what is held. With fourfold sizes, and a last one at least twice the one before, all moves
# of a sequence copy at most two thirds of its last slot; each size more is one more space, and a decode step
# per space reads the weights again.
_GROWTH = 4
# Kernels read a batch from the address of its first slot: keep that as aligned as a fresh allocation.
_ALIGNMENT_BYTES = 256
SWAP_BYTES = 1 << 20


@dataclass(frozen=True)
class Bucket:
    """So many slots of one capacity."""

    capacity_tokens: int
    slots: int


@dataclass(frozen=True)
class Rows:
    """Where equally spaced rows of bytes lie: one row per head."""

    address: int
    pitch_bytes: int


class Allocator(Protocol):
    """Memory that a runtime's kernels reach.

    Copies take effect in the order in which they are asked for, after the step before and before the next.
    """

    def allocate(self, size_bytes: int) -> int:
        """The address of so many zeroed bytes, aligned to 256; raises MemoryError.

        Zeroed, because a masked position still counts as zero times its value, and a stray NaN would win.
        """

    def free(self, address: int) -> None:
        """Gives an allocation back, once."""

    def copy(self, source: Rows, target: Rows, row_bytes: int, rows: int) -> None:
        """Copies so many bytes of each row; the two do not overlap."""


class HostAllocator:
    """Anonymous memory of the process."""

    def __init__(self) -> None:
        self._mappings: dict[int, mmap.mmap] = {}

    def allocate(self, size_bytes: int) -> int:
        """Whole pages from the kernel."""
        try:
            mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"mmap of {size_bytes} bytes for the KV cache: {error}") from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._mappings[address] = mapping
        return address

    def free(self, address: int) -> None:
        """Unmaps it."""
        self._mappings.pop(address).close()

    def copy(self, source: Rows, target: Rows, row_bytes: int, rows: int) -> None:
        """Row by row."""
        for row in range(rows):
            ctypes.memmove(
                target.address + row * target.pitch_bytes,
                source.address + row * source.pitch_bytes,
                row_bytes,
            )


def divide(
    bound_bytes: int, geometry: KvGeometry, context_tokens: int, max_sequences: int
) -> tuple[Bucket, ...]:
    """Cuts the bound into buckets, smallest capacity first.

    If every sequence can have a slot of the whole context, that is all there is: nothing ever moves, and all
    rows share a step. If not, each size gets one slot, the largest first, so that a sequence alone can grow
    step by step to the context. The rest goes to the sizes from the smallest up, at most `max_sequences`
    slots each: many sequences of moderate length before a second very long one. A size for which nothing is
    left is left out. What remains is too little for one more useful slot, and is not taken.

    Args:
        bound_bytes: Most that all slots together take.
        geometry: What a token takes.
        context_tokens: Longest sequence; rounded up where slots would not be aligned otherwise.
        max_sequences: Most sequences at once.

    Raises:
        ValueError: An argument is out of range, or the bound does not hold one sequence of the context.
    """
    if min(context_tokens, max_sequences) < 1:
        raise ValueError("context_tokens and max_sequences are at least 1")
    largest = _aligned(context_tokens, geometry)
    left = bound_bytes // geometry.bytes_per_token
    if largest > left:
        needed_bytes = largest * geometry.bytes_per_token
        raise ValueError(
            f"bound_bytes: one sequence of {context_tokens:,} tokens takes {needed_bytes:,} bytes of KV "
            f"cache, the bound is {bound_bytes:,}; lower the context"
        )
    if largest * max_sequences <= left:
        return (Bucket(largest, max_sequences),)
    slots: dict[int, int] = {}
    for capacity in reversed(_capacities(largest)):
        slots[capacity] = min(1, left // capacity)
        left -= slots[capacity] * capacity
    for capacity in _capacities(largest):
        more = min(max_sequences - slots[capacity], left // capacity)
        slots[capacity] += more
        left -= more * capacity
    return tuple(Bucket(capacity, count) for capacity, count in sorted(slots.items()) if count)


def _capacities(largest: int) -> list[int]:
    # A size is worth a space of its own only if it is at most half of the largest.
    sizes = []
    capacity = SMALLEST_TOKENS
    while 2 * capacity <= largest:
        sizes.append(capacity)
        capacity *= _GROWTH
    return [*sizes, largest]


def _aligned(tokens: int, geometry: KvGeometry) -> int:
    slot_token_bytes = geometry.kv_heads * geometry.head_dim * geometry.item_bytes
    step = _ALIGNMENT_BYTES // math.gcd(_ALIGNMENT_BYTES, slot_token_bytes)
    return -(-tokens // step) * step


@dataclass
class _Held:
    """A handle: where it lies, and how many tokens it may hold there."""

    space: int
    slot: int
    room_tokens: int


class _Slab:
    """One bucket's memory: the keys of all layers, then the values; and who holds which slot."""

    def __init__(self, geometry: KvGeometry, bucket: Bucket, address: int) -> None:
        self.capacity = bucket.capacity_tokens
        self.head_bytes = self.capacity * geometry.head_dim * geometry.item_bytes
        self.stride = geometry.kv_heads * self.head_bytes
        self.holders: list[int | None] = [None] * bucket.slots
        self.bases = [address + i * bucket.slots * self.stride for i in range(2 * geometry.layers)]
        self._shape = (bucket.slots, geometry.kv_heads, self.capacity, geometry.head_dim)

    def free_slot(self) -> int | None:
        """The first: those in use stay close together."""
        return self.holders.index(None) if None in self.holders else None

    def rows(self, slot: int) -> list[Rows]:
        """A slot's part of each tensor."""
        return [Rows(base + slot * self.stride, self.head_bytes) for base in self.bases]

    def space(self) -> KvSpace:
        """As a runner sees it."""
        tensors = tuple(KvTensor(base, self._shape, self.stride) for base in self.bases)
        half = len(tensors) // 2
        return KvSpace(tensors[:half], tensors[half:])


class SlotBucketKvMemory:
    """One space per bucket. It owns all that it takes from the allocator, and gives it back in `close`.

    A handle lies in a slot of the smallest capacity that holds it, never in a larger one: a short sequence in
    the only long slot would stop a long one from growing, and would take more than `bytes_for` says. So
    `allocate` and `extend` may refuse although bytes are left in other sizes; the caller then waits until a
    slot is given back, or frees one itself. Whoever is alone is never refused up to `capacity_tokens`. Only
    after `trim` may a handle lie in a larger slot than it needs.

    Two handles change places through `swap_bytes` of memory, which are workspace: they come on top of the
    buckets. A slot held in reserve for that would cost as much as a sequence.

    Raises ValueError for buckets that are none, empty or not ascending, and MemoryError when the allocator
    refuses.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        buckets: Sequence[Bucket],
        allocator: Allocator,
        *,
        swap_bytes: int = SWAP_BYTES,
    ) -> None:
        capacities = [bucket.capacity_tokens for bucket in buckets]
        if not buckets or capacities != sorted(set(capacities)) or min(b.slots for b in buckets) < 1:
            raise ValueError(f"buckets: at least one, of ascending capacity, with slots each; got {buckets}")
        self.geometry = geometry
        self._allocator = allocator
        self._token_bytes = geometry.head_dim * geometry.item_bytes
        self._swap_width = max(swap_bytes // geometry.kv_heads, 1)
        self._held: dict[int, _Held] = {}
        self._next_handle = 0
        self._addresses: list[int] = []
        try:
            self._slabs = [_Slab(geometry, b, self._take(self._bucket_bytes(b))) for b in buckets]
            self._swap_address = self._take(self._swap_width * geometry.kv_heads)
        except BaseException:
            self.close()
            raise

    @property
    def spaces(self) -> tuple[KvSpace, ...]:
        """One per bucket, smallest capacity first."""
        return tuple(slab.space() for slab in self._slabs)

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence: a slot of the last bucket."""
        return self._slabs[-1].capacity

    def bytes_for(self, tokens: int) -> int:
        """A whole slot of the smallest capacity that holds them.

        More than `capacity_tokens` get the bytes that they would take; no slot holds them.
        """
        index = self._bucket_for(tokens)
        slot_tokens = tokens if index is None else self._slabs[index].capacity
        return slot_tokens * self.geometry.bytes_per_token if tokens else 0

    def allocate(self, tokens: int) -> int | None:
        """A slot of the smallest capacity that holds them."""
        place = self._free_place(tokens)
        if place is None:
            return None
        self._next_handle += 1
        self._held[self._next_handle] = _Held(place.space, place.slot, tokens)
        self._slabs[place.space].holders[place.slot] = self._next_handle
        return self._next_handle

    def extend(self, handle: int, held_tokens: int, tokens: int) -> bool:
        """Stays where there is room; otherwise moves up, copying what is held."""
        held = self._held[handle]
        if tokens > self._slabs[held.space].capacity:
            place = self._free_place(tokens)
            if place is None:
                return False
            self._move(handle, place, held_tokens)
        held.room_tokens = max(held.room_tokens, tokens)
        return True

    def trim(self, handle: int, tokens: int) -> None:
        """Moves nothing, for `place` stays true: what is trimmed is only not copied any more."""
        held = self._held[handle]
        held.room_tokens = min(held.room_tokens, tokens)

    def free(self, handle: int) -> None:
        """Makes the slot free. Its bytes stay; nobody reads beyond the tokens that he has written."""
        held = self._held.pop(handle)
        self._slabs[held.space].holders[held.slot] = None

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies head by head; the two may lie in different buckets."""
        self._copy(self.place(source), self.place(target), tokens)

    def place(self, handle: int) -> Place:
        """Its slot in its bucket."""
        held = self._held[handle]
        return Place(held.space, held.slot)

    def arrange(self, handles: Sequence[int]) -> list[list[int]]:
        """One group per bucket that they lie in; what is adjacent already stays."""
        wanted_in: dict[int, set[int]] = {}
        for handle in handles:
            wanted_in.setdefault(self._held[handle].space, set()).add(handle)
        return [self._gather(index, wanted) for index, wanted in sorted(wanted_in.items())]

    def close(self) -> None:
        """Gives all of it back to the allocator."""
        while self._addresses:
            self._allocator.free(self._addresses.pop())

    def _take(self, size_bytes: int) -> int:
        address = self._allocator.allocate(size_bytes)
        self._addresses.append(address)
        return address

    def _bucket_bytes(self, bucket: Bucket) -> int:
        return bucket.slots * bucket.capacity_tokens * self.geometry.bytes_per_token

    def _bucket_for(self, tokens: int) -> int | None:
        return next((i for i, slab in enumerate(self._slabs) if slab.capacity >= tokens), None)

    def _free_place(self, tokens: int) -> Place | None:
        index = self._bucket_for(tokens)
        slot = None if index is None else self._slabs[index].free_slot()
        return None if index is None or slot is None else Place(index, slot)

    def _gather(self, index: int, wanted: set[int]) -> list[int]:
        slab = self._slabs[index]
        window = self._cheapest_window(slab, wanted)
        outside = sorted(handle for handle in wanted if self._held[handle].slot not in window)
        # Free ones first: a handle that moves in leaves a free slot outside, where an unwanted one can go.
        targets = sorted(
            (slot for slot in window if slab.holders[slot] not in wanted),
            key=lambda slot: slab.holders[slot] is not None,
        )
        for handle, target in zip(outside, targets, strict=True):
            holder = slab.holders[target]
            free = slab.free_slot()
            if holder is not None and free is None:
                self._swap(handle, holder)
                continue
            if holder is not None and free is not None:
                self._shift(holder, free)
            self._shift(handle, target)
        return sorted(wanted, key=lambda handle: self._held[handle].slot)

    def _cheapest_window(self, slab: _Slab, wanted: set[int]) -> range:
        """The adjacent slots into which fewest tokens have to be moved; the first of equals, so that a runner
        meets the same addresses again.
        """

        def tokens_moved(first: int) -> int:
            window = slab.holders[first : first + len(wanted)]
            leaving = [h for h in window if h is not None and h not in wanted]
            return sum(self._held[h].room_tokens for h in [*leaving, *wanted.difference(window)])

        first = min(range(len(slab.holders) - len(wanted) + 1), key=tokens_moved)
        return range(first, first + len(wanted))

    def _shift(self, handle: int, slot: int) -> None:
        held = self._held[handle]
        self._move(handle, Place(held.space, slot), held.room_tokens)

    def _move(self, handle: int, target: Place, tokens: int) -> None:
        held = self._held[handle]
        self._copy(self.place(handle), target, tokens)
        self._slabs[held.space].holders[held.slot] = None
        self._slabs[target.space].holders[target.slot] = handle
        held.space, held.slot = target.space, target.slot

    def _copy(self, source: Place, target: Place, tokens: int) -> None:
        ours, theirs = self._slabs[source.space], self._slabs[target.space]
        if tokens > min(ours.capacity, theirs.capacity):
            raise ValueError(f"tokens: {tokens} do not fit slots of {ours.capacity} and {theirs.capacity}")
        if source == target or tokens == 0:
            return
        for old, new in zip(ours.rows(source.slot), theirs.rows(target.slot), strict=True):
            self._allocator.copy(old, new, tokens * self._token_bytes, self.geometry.kv_heads)

    def _swap(self, one: int, other: int) -> None:
        """Lets two of one bucket change places, piece by piece."""
        a, b = self._held[one], self._held[other]
        slab = self._slabs[a.space]
        length = max(a.room_tokens, b.room_tokens) * self._token_bytes
        swap, heads = Rows(self._swap_address, self._swap_width), self.geometry.kv_heads
        for of_one, of_other in zip(slab.rows(a.slot), slab.rows(b.slot), strict=True):
            for offset in range(0, length, self._swap_width):
                width = min(self._swap_width, length - offset)
                first = Rows(of_one.address + offset, slab.head_bytes)
                second = Rows(of_other.address + offset, slab.head_bytes)
                self._allocator.copy(first, swap, width, heads)
                self._allocator.copy(second, first, width, heads)
                self._allocator.copy(swap, second, width, heads)
        a.slot, b.slot = b.slot, a.slot
        slab.holders[a.slot], slab.holders[b.slot] = one, other
