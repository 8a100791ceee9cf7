"""Decides what the next step computes: a chunk of one prompt, or one more token of every running sequence.

Continuous batching: a sequence joins as soon as its memory can be promised, first come first served, and
leaves when it ends. Prompts are computed in chunks that take turns with decode steps, so that a long prompt
never stops the running streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from edgellm_agent.worker.kv_pool import KvPool
from edgellm_agent.worker.sequence import Sequence


class QueueFullError(Exception):
    """So many requests wait that another would wait too long."""


@dataclass(frozen=True)
class Limits:
    """Bounds of the queue and of a step."""

    max_sequences: int
    max_waiting: int
    prefill_tokens: int


@dataclass(frozen=True)
class Work:
    """A sequence's share of the next step: compute the tokens up to `until`, and choose the next one if all
    are then known.
    """

    sequence: Sequence
    until: int

    @property
    def samples(self) -> bool:
        """Whether this work ends in a new token."""
        return self.until == len(self.sequence.tokens)


class Scheduler:
    """Owns the order of sequences; the pool owns their memory."""

    def __init__(self, pool: KvPool, limits: Limits) -> None:
        self._pool = pool
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._last_was_prefill = False

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; raises TooLargeError or QueueFullError."""
        self._pool.check_fits(sequence.promised_tokens)
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFullError
        self._waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work; empty if there is nothing to do, or every stream waits for its reader."""
        self._admit()
        ready = [s for s in self._running.values() if s.credit > 0]
        prefill = next((s for s in ready if s.in_prefill), None)
        decode = [s for s in ready if not s.in_prefill]
        if prefill is not None and not (decode and self._last_was_prefill):
            self._last_was_prefill = True
            return [Work(prefill, min(prefill.computed + self._limits.prefill_tokens, prefill.prompt_tokens))]
        self._last_was_prefill = False
        order = self._pool.arrange(s.id for s in decode)
        return [Work(self._running[i], len(self._running[i].tokens)) for i in order]

    def remove(self, sequence_id: int) -> tuple[Sequence, int] | None:
        """Takes a sequence out, wherever it is, and returns it with the KV bytes that it held.

        None if it is not here.
        """
        running = self._running.pop(sequence_id, None)
        if running is not None:
            return running, self._pool.release(sequence_id)
        for sequence in self._waiting:
            if sequence.id == sequence_id:
                self._waiting.remove(sequence)
                return sequence, 0
        return None

    def find(self, sequence_id: int) -> Sequence | None:
        """The sequence, if it waits or runs."""
        return next((s for s in self if s.id == sequence_id), None)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed."""
        return [s for s in self if s.deadline is not None and s.deadline <= now]

    def next_deadline(self) -> float | None:
        """The earliest deadline, monotonic seconds."""
        return min((s.deadline for s in self if s.deadline is not None), default=None)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, running ones first."""
        yield from self._running.values()
        yield from self._waiting

    @property
    def running(self) -> int:
        """Sequences that hold memory."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    def _admit(self) -> None:
        while (
            self._waiting
            and len(self._running) < self._limits.max_sequences
            and self._pool.can_attach(self._waiting[0].promised_tokens)
        ):
            sequence = self._waiting.popleft()
            self._pool.attach(sequence.id, sequence.promised_tokens)
            self._running[sequence.id] = sequence
