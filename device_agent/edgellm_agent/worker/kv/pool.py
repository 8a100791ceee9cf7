"""Accounts for the KV cache.

Which sequence has which slot, how many bytes are used and how many are promised.

A sequence is attached with a promise for its longest possible length, so that one that has begun can always
end. Promises never exceed the bound. Used bytes are those backed by pages; they follow the tokens written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgellm_agent.worker.kv_memory import KvMemory


class TooLargeError(Exception):
    """The sequence would not fit even if it were alone; both figures in bytes."""

    def __init__(self, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(f"needs {needed_bytes:,} bytes of KV cache, its bound is {available_bytes:,}")
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


@dataclass(frozen=True)
class KvStats:
    """Bytes of the cache; used <= promised <= bound."""

    used_bytes: int
    promised_bytes: int
    bound_bytes: int


@dataclass
class _Attached:
    slot: int
    promised_tokens: int
    tokens: int = 0


class KvPool:
    """Slots and bytes of the KV cache. It owns the memory; sequences are known by id alone."""

    def __init__(self, memory: KvMemory, bound_bytes: int) -> None:
        self._memory = memory
        self._bound_bytes = bound_bytes
        self._attached: dict[int, _Attached] = {}
        # One slot is kept free, so that any two can change places.
        self._free = set(range(memory.slots))

    def bytes_for(self, tokens: int) -> int:
        """Memory of a sequence of so many tokens."""
        return self._memory.geometry.bytes_for(tokens)

    def check_fits(self, tokens: int) -> None:
        """Raises TooLargeError for a sequence that would not fit even if it were alone."""
        if self.bytes_for(tokens) > self._bound_bytes:
            raise TooLargeError(self.bytes_for(tokens), self._bound_bytes)

    def can_attach(self, promised_tokens: int) -> bool:
        """Whether `attach` would succeed now."""
        fits = self._promised_bytes() + self.bytes_for(promised_tokens) <= self._bound_bytes
        return fits and len(self._free) > 1

    def attach(self, sequence: int, promised_tokens: int) -> None:
        """Gives a sequence a slot and the promise of its memory; only after `can_attach`."""
        if not self.can_attach(promised_tokens) or sequence in self._attached:
            raise ValueError(f"sequence {sequence} cannot be attached")
        slot = min(self._free)
        self._free.remove(slot)
        self._attached[sequence] = _Attached(slot, promised_tokens)

    def grow(self, sequence: int, tokens: int) -> None:
        """Tells that the sequence now holds so many tokens; at most what was promised."""
        attached = self._attached[sequence]
        if not attached.tokens <= tokens <= attached.promised_tokens:
            raise ValueError(f"sequence {sequence}: {tokens} tokens, {attached.promised_tokens} promised")
        attached.tokens = tokens

    def release(self, sequence: int) -> int:
        """Takes slot and pages back; returns the bytes that the sequence had used."""
        attached = self._attached.pop(sequence)
        self._memory.clear(attached.slot)
        self._free.add(attached.slot)
        return self.bytes_for(attached.tokens)

    def slot(self, sequence: int) -> int:
        """The sequence's slot, until the next `arrange`."""
        return self._attached[sequence].slot

    def arrange(self, sequences: Iterable[int]) -> list[int]:
        """Moves these sequences into the first slots, as a batched kernel needs them.

        Returns them in slot order.
        """
        wanted = set(sequences)
        by_slot = {a.slot: s for s, a in self._attached.items()}
        outside = [s for s in wanted if self._attached[s].slot >= len(wanted)]
        for target in range(len(wanted)):
            holder = by_slot.get(target)
            if holder in wanted:
                continue
            if holder is not None:
                self._move(holder, max(self._free))
            self._move(outside.pop(), target)
        return sorted(wanted, key=self.slot)

    def stats(self) -> KvStats:
        """What is used and promised now."""
        used = sum(self.bytes_for(a.tokens) for a in self._attached.values())
        return KvStats(used, self._promised_bytes(), self._bound_bytes)

    def close(self) -> None:
        """Gives all memory back."""
        self._memory.close()

    def _promised_bytes(self) -> int:
        return sum(self.bytes_for(a.promised_tokens) for a in self._attached.values())

    def _move(self, sequence: int, target: int) -> None:
        attached = self._attached[sequence]
        self._memory.move(attached.slot, target)
        self._free.discard(target)
        self._free.add(attached.slot)
        attached.slot = target
