"""Accounts for the KV cache: who holds how much of it, what may be reused, what goes first.

A live sequence is charged for the room that it was given: its whole prompt when it is attached, then page by
page as it grows. A finished one stays, charged for what it holds, because the next request may begin with the
same tokens; it goes when memory is needed, least recently used first. Live and cached bytes together never
exceed the bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgellm_agent.worker.kv.base import KvMemory, Place

# A shorter prefix costs less to compute than to look after.
MIN_PREFIX_TOKENS = 16


class TooLargeError(Exception):
    """The sequence would not fit even if it were alone; both figures in bytes."""

    def __init__(self, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(f"needs {needed_bytes:,} bytes of KV cache, its bound is {available_bytes:,}")
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


@dataclass(frozen=True)
class KvStats:
    """Bytes of the cache; cached <= used, and used and promised together with it stay within the bound."""

    used_bytes: int
    """Held by tokens, those of finished sequences included."""
    cached_bytes: int
    """Of these, held by finished sequences."""
    promised_bytes: int
    """Charged to live sequences."""
    bound_bytes: int


@dataclass(eq=False)
class _Entry:
    """What lies under a handle: the first `held` of `tokens`, with room for `room`."""

    handle: int
    tokens: Sequence[int]
    held: int
    room: int


class KvPool:
    """Owns the memory; sequences are known by id, and lend their list of tokens, which may only grow."""

    def __init__(self, memory: KvMemory, bound_bytes: int) -> None:
        self._memory = memory
        self._granted_bytes = self._bound_bytes = bound_bytes
        self._live: dict[int, _Entry] = {}
        self._cached: OrderedDict[int, _Entry] = OrderedDict()
        self._promised_bytes = 0
        self._cached_bytes = 0

    @property
    def bound_bytes(self) -> int:
        """What live and cached sequences may take together."""
        return self._bound_bytes

    def bytes_for(self, tokens: int) -> int:
        """Memory of a sequence of so many tokens."""
        return self._memory.bytes_for(tokens)

    def check_fits(self, tokens: int) -> None:
        """Raises TooLargeError for a sequence that would not fit even if it had all that was granted."""
        if self.bytes_for(tokens) > self._granted_bytes:
            raise TooLargeError(self.bytes_for(tokens), self._granted_bytes)

    def attach(self, sequence: int, tokens: Sequence[int], spare_tokens: int = 0) -> int | None:
        """Gives a sequence room for all its tokens; cached prefixes make way if need be.

        Room for `spare_tokens` must be left to live sequences. Returns how many of the tokens are there
        already, always less than all; None if only live sequences could make way.
        """
        if sequence in self._live:
            raise ValueError(f"sequence {sequence} is attached already")
        if not self.could_attach(len(tokens), spare_tokens):
            return None
        donor, length = self._longest_prefix(tokens)
        entry = self._copied(donor, length, len(tokens)) or self._taken_over(donor, length, len(tokens))
        if entry is None:
            return None
        entry.tokens, entry.held = tokens, length
        self._live[sequence] = entry
        self._promised_bytes += self.bytes_for(entry.room)
        return length

    def could_attach(self, tokens: int, spare_tokens: int = 0, without: Iterable[int] = ()) -> bool:
        """Whether there would be room without these sequences and all cached prefixes."""
        needed = self.bytes_for(tokens) + self.bytes_for(spare_tokens)
        freed = sum(self.bytes_for(self._live[s].room) for s in without)
        return self._promised_bytes - freed + needed <= self._bound_bytes

    def grow(self, sequence: int, tokens: int) -> bool:
        """Room for so many tokens; False if only other live sequences could make way."""
        entry = self._live[sequence]
        if tokens <= entry.room:
            return True
        more = self.bytes_for(tokens) - self.bytes_for(entry.room)
        while not (self._has(more) and self._memory.extend(entry.handle, entry.held, tokens)):
            if not self._evict():
                return False
        self._promised_bytes += more
        entry.room = tokens
        return True

    def advance(self, sequence: int, tokens: int) -> None:
        """Tells that the first so many tokens are computed."""
        entry = self._live[sequence]
        if not 0 <= tokens <= entry.room:
            raise ValueError(f"sequence {sequence}: {tokens} tokens, room for {entry.room}")
        entry.held = tokens

    def release(self, sequence: int, *, keep: bool = False) -> int:
        """Ends a sequence's claim; kept, it becomes a cached prefix. Returns the bytes that it had used."""
        entry = self._live.pop(sequence)
        self._promised_bytes -= self.bytes_for(entry.room)
        used = self.bytes_for(entry.held)
        if keep and entry.held >= MIN_PREFIX_TOKENS and self._has(used):
            self._memory.trim(entry.handle, entry.held)
            entry.room = entry.held
            self._cached[entry.handle] = entry
            self._cached_bytes += used
        else:
            self._memory.free(entry.handle)
        return used

    def resize(self, bound_bytes: int) -> None:
        """Sets the bound; cached prefixes go at once. What live sequences hold beyond it is `over_bytes`."""
        self._bound_bytes = bound_bytes
        while not self._has(0) and self._evict():
            pass

    @property
    def over_bytes(self) -> int:
        """What live sequences must give back."""
        return max(0, self._promised_bytes - self._bound_bytes)

    def place(self, sequence: int) -> Place:
        """Where the sequence lies, until the next `arrange` or `grow`."""
        return self._memory.place(self._live[sequence].handle)

    def arrange(self, sequences: Iterable[int]) -> list[list[int]]:
        """Groups of sequences that can share a step, each in slot order."""
        by_handle = {self._live[s].handle: s for s in sequences}
        return [[by_handle[h] for h in group] for group in self._memory.arrange(list(by_handle))]

    def stats(self) -> KvStats:
        """What is used and promised now."""
        used = self._cached_bytes + sum(self.bytes_for(e.held) for e in self._live.values())
        return KvStats(used, self._cached_bytes, self._promised_bytes, self._bound_bytes)

    def close(self) -> None:
        """Gives all memory back."""
        self._memory.close()

    def _has(self, more_bytes: int) -> bool:
        return self._promised_bytes + self._cached_bytes + more_bytes <= self._bound_bytes

    def _longest_prefix(self, tokens: Sequence[int]) -> tuple[_Entry | None, int]:
        """The entry that shares most tokens from the start; cached ones first, since they can be taken."""
        best, length = None, MIN_PREFIX_TOKENS - 1
        for entry in (*self._cached.values(), *self._live.values()):
            # The last token is always computed: its logits are wanted.
            limit = min(entry.held, len(tokens) - 1)
            if limit > length and (shared := _shared_prefix(entry.tokens, tokens, limit)) > length:
                best, length = entry, shared
        return (best, length) if best is not None else (None, 0)

    def _copied(self, donor: _Entry | None, length: int, room: int) -> _Entry | None:
        """Memory of its own with the donor's prefix in it; None if there is none, or no need for two."""
        if donor is not None and donor.handle in self._cached:
            self._cached.move_to_end(donor.handle)
            if donor.held - length < MIN_PREFIX_TOKENS:
                return None
        handle = None
        while not self._has(self.bytes_for(room)) or (handle := self._memory.allocate(room)) is None:
            if not self._evict(spare=donor):
                return None
        if donor is not None:
            self._memory.copy(donor.handle, handle, length)
        return _Entry(handle, (), length, room)

    def _taken_over(self, donor: _Entry | None, length: int, room: int) -> _Entry | None:
        """The donor's own memory, if it is a cached one; what it holds beyond the prefix is lost."""
        if donor is None or donor.handle not in self._cached:
            return None
        self._uncache(donor)
        self._memory.trim(donor.handle, length)
        donor.held = donor.room = length
        while not (self._has(self.bytes_for(room)) and self._memory.extend(donor.handle, length, room)):
            if not self._evict():
                self._cached[donor.handle] = donor
                self._cached_bytes += self.bytes_for(length)
                return None
        donor.room = room
        return donor

    def _evict(self, spare: _Entry | None = None) -> bool:
        """Drops the least recently used cached prefix; False if there is none left to drop."""
        entry = next((e for e in self._cached.values() if e is not spare), None)
        if entry is None:
            return False
        self._uncache(entry)
        self._memory.free(entry.handle)
        return True

    def _uncache(self, entry: _Entry) -> None:
        del self._cached[entry.handle]
        self._cached_bytes -= self.bytes_for(entry.held)


def _shared_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Length of the common prefix, at most `limit`: halving, since comparing slices is fast."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
