"""Decides what the next turn computes: a chunk of a prompt, or one more token of every running sequence.

Continuous batching: a sequence joins as soon as there is memory for its prompt, and leaves when it ends.
Prompts are computed in chunks that take turns with decode steps, so that a long one never stops the running
streams. When memory runs out, cached prefixes go first; then a running sequence is preempted: it returns to
the queue with all its tokens and computes again what its memory held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edgellm.memory import VERIFIED_TOKENS
from edgellm_agent.worker.kv.pool import KvPool
from edgellm_agent.worker.prefill import PrefillBudget
from edgellm_agent.worker.sequence import Sequence
from edgellm_agent.worker.speculation import StepTimes
from edgellm_agent.worker.structured import GrammarError
from edgellm_agent.worker.waiting import WaitingQueue

# A sequence begins only if those that run can each grow by so many tokens beside it: it would be the first to
# be preempted.
_SPARE_TOKENS = 64


@dataclass(frozen=True)
class Limits:
    """Bounds of a turn."""

    max_sequences: int
    speculate: bool = True
    several_multi_token_rows: bool = False
    """The runner takes rows of several tokens side by side."""


@dataclass(frozen=True)
class Work:
    """A sequence's share of a step.

    Compute its tokens up to `until` and the drafts behind them, and choose the next one if all are known.
    """

    sequence: Sequence
    until: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether this work ends in a new token."""
        return self.until == len(self.sequence.tokens)

    @property
    def width(self) -> int:
        """Tokens that the runner computes for it."""
        return self.until - self.sequence.computed + len(self.drafts)


Batch = tuple[Work, ...]
"""One step of the runner: rows in slot order, in one space."""


class Scheduler:
    """Owns the order of sequences; the pool owns their memory."""

    def __init__(
        self,
        pool: KvPool,
        queue: WaitingQueue,
        budget: PrefillBudget,
        times: StepTimes,
        limits: Limits,
    ) -> None:
        self._pool = pool
        self._queue = queue
        self._budget = budget
        self._times = times
        self.limits = limits
        self._running: dict[int, Sequence] = {}
        self._last_was_prefill = False
        self.preemptions_total = 0

    def add(self, sequence: Sequence) -> Sequence | None:
        """Queues a sequence; raises TooLargeError. Returns the one for which the queue is now too long."""
        self._pool.check_fits(sequence.longest)
        free = max(0, self.limits.max_sequences - len(self._running))
        return self._queue.add(sequence, active={s.client for s in self._running.values()}, free=free)

    def schedule(self) -> list[Batch]:
        """The next turn's steps; none if there is nothing to do, or every stream waits for its reader."""
        self._admit()
        prefill = [s for s in self._running.values() if s.in_prefill]
        decode = [s for s in self._running.values() if not s.in_prefill and s.credit > 0]
        if prefill and not (decode and self._last_was_prefill):
            self._last_was_prefill = True
            return [self._prefill(prefill, others_wait=bool(decode))]
        self._last_was_prefill = False
        return self._decode(decode)

    def resize(self, kv_bytes: int, max_sequences: int) -> None:
        """New limits; what is held beyond them is given back at once, however long the worker rests."""
        self._pool.resize(kv_bytes)
        self.limits = Limits(max_sequences, self.limits.speculate, self.limits.several_multi_token_rows)
        while self._running and (self._pool.over_bytes or len(self._running) > self.limits.max_sequences):
            self._preempt(self._least_missed())

    def remove(self, sequence: Sequence, *, keep: bool = False) -> int:
        """Takes a sequence out, wherever it is; returns the KV bytes that it held.

        With `keep`, what it computed may serve as a prefix.
        """
        if self._running.pop(sequence.id, None) is not None:
            return self._pool.release(sequence.id, keep=keep)
        self._queue.remove(sequence)
        return 0

    def find(self, sequence_id: int) -> Sequence | None:
        """The sequence, if it waits or runs."""
        return self._running.get(sequence_id) or next((s for s in self._queue if s.id == sequence_id), None)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed."""
        return [s for s in self if s.deadline is not None and s.deadline <= now]

    def hopeless(self) -> list[Sequence]:
        """Waiting sequences that no longer fit, since the bound has shrunk."""
        return [s for s in self._queue if self._pool.bytes_for(len(s.tokens) + 1) > self._pool.bound_bytes]

    def next_deadline(self) -> float | None:
        """The earliest deadline, monotonic seconds."""
        return min((s.deadline for s in self if s.deadline is not None), default=None)

    def served(self, sequence: Sequence, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """Counts what a client got."""
        self._queue.charge(sequence.client, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, running ones first."""
        yield from self._running.values()
        yield from self._queue

    @property
    def running(self) -> int:
        """Sequences that hold memory."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._queue)

    def _admit(self) -> None:
        """Lets waiting sequences begin: one prompt at a time, or several short ones if a step takes them."""
        room = self._budget.tokens(others_wait=bool(self._running))
        for _ in range(self.limits.max_sequences):
            prefill = [s for s in self._running.values() if s.in_prefill]
            sequence = self._queue.next()
            if sequence is None:
                return
            widest = max(len(s.tokens) - s.computed for s in (*prefill, sequence))
            fits = (len(prefill) + 1) * widest <= room
            if prefill and not (self.limits.several_multi_token_rows and fits):
                return
            if not self._begin(sequence):
                return

    def _begin(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence its place and memory; others make way if that is enough."""
        victims = self._in_the_way(sequence)
        if victims is None:
            return False
        for victim in victims:
            self._preempt(victim)
        cached = self._pool.attach(sequence.id, sequence.tokens, self._spare_tokens())
        if cached is None:
            return False
        self._queue.remove(sequence)
        self._running[sequence.id] = sequence
        sequence.computed = cached
        sequence.account.cached += max(0, min(cached, sequence.prompt_tokens) - sequence.computed_before)
        return True

    def _in_the_way(self, sequence: Sequence) -> list[Sequence] | None:
        """The fewest that must make way; None if all that may are not enough."""
        victims: list[Sequence] = []
        while not self._fits(sequence, victims):
            left = [s for s in self._running.values() if s not in victims]
            stalled = [s for s in left if s.credit <= 0]
            victim = _youngest(stalled) if stalled else _of_greediest(left, sequence.client)
            if victim is None:
                return None
            victims.append(victim)
        return victims

    def _fits(self, sequence: Sequence, without: list[Sequence]) -> bool:
        return len(self._running) - len(without) < self.limits.max_sequences and self._pool.could_attach(
            len(sequence.tokens), self._spare_tokens(len(without)), (s.id for s in without)
        )

    def _spare_tokens(self, fewer: int = 0) -> int:
        """What those that run must still be able to grow by."""
        return (len(self._running) - fewer) * _SPARE_TOKENS

    def _prefill(self, sequences: list[Sequence], *, others_wait: bool) -> Batch:
        tokens = self._budget.tokens(others_wait=others_wait)
        # One row may lie where it is.
        group = [sequences[0].id] if len(sequences) == 1 else self._pool.arrange(s.id for s in sequences)[0]
        rows = [self._running[i] for i in group]
        share = max(1, tokens // len(rows))
        return tuple(Work(s, min(s.computed + share, len(s.tokens))) for s in rows)

    def _decode(self, sequences: list[Sequence]) -> list[Batch]:
        drafts = self._drafts(sequences)
        for s in sequences:
            # It may just have been preempted for an older one. Drafts are not worth anybody's memory.
            if s.id in self._running and not self._pool.grow(s.id, len(s.tokens) + len(drafts[s.id])):
                drafts[s.id] = ()
                self._grow(s)
        groups = self._pool.arrange(s.id for s in sequences if s.id in self._running)
        return [
            tuple(Work(self._running[i], len(self._running[i].tokens), drafts[i]) for i in group)
            for group in groups
        ]

    def _drafts(self, sequences: list[Sequence]) -> dict[int, tuple[int, ...]]:
        """Guesses by sequence; none where the wider step would cost more than they may bring.

        None while a prompt takes turns with these steps either: its first token waits for them.
        """
        rows = len(sequences)
        if any(s.in_prefill for s in self._running.values()):
            return {s.id: () for s in sequences}
        drafts = {s.id: self._draft(s, rows=rows) for s in sequences}
        width = 1 + max(map(len, drafts.values()), default=0)
        expected = rows + sum(
            len(drafts[s.id]) * (s.lookup.acceptance if s.matcher is None else 1.0) for s in sequences
        )
        if width > 1 and not self._times.worth(rows, width, expected):
            return dict.fromkeys(drafts, ())
        return drafts

    def _draft(self, sequence: Sequence, *, rows: int) -> tuple[int, ...]:
        """Tokens to verify beside the newest one."""
        limits = self.limits
        if not limits.speculate or not (rows == 1 or limits.several_multi_token_rows):
            return ()
        longest = min(
            sequence.lookup.draft_tokens,
            VERIFIED_TOKENS // rows - 1,
            sequence.longest - len(sequence.tokens) - 1,
            sequence.credit - 1,
        )
        if longest < 1:
            return ()
        if sequence.matcher is not None:
            # Guesses would mostly be refused by the grammar; what it forces is never wrong.
            with contextlib.suppress(GrammarError):  # the next choice meets it again, and ends the request
                return tuple(sequence.matcher.forced()[:longest])
            return ()
        return tuple(sequence.lookup.propose(sequence.tokens, longest))

    def _grow(self, sequence: Sequence) -> None:
        """Room for the newest token; the youngest make way, and it goes itself if it is the youngest."""
        while sequence.id in self._running and not self._pool.grow(sequence.id, len(sequence.tokens)):
            self._preempt(self._least_missed())

    def _least_missed(self) -> Sequence:
        """The youngest whose reader keeps it waiting, else the youngest: so the oldest always ends."""
        stalled = [s for s in self._running.values() if s.credit <= 0]
        return _youngest(stalled or self._running.values())

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._pool.release(sequence.id, keep=True)
        sequence.computed_before = max(sequence.computed_before, sequence.computed)
        sequence.computed = 0
        self._queue.put_back(sequence)
        self.preemptions_total += 1


def _youngest(sequences: Iterable[Sequence]) -> Sequence:
    return max(sequences, key=lambda s: (s.timeline.arrived, s.id))


def _of_greediest(sequences: Iterable[Sequence], client: str) -> Sequence | None:
    """The youngest of the client that has most, if that is at least two more than `client` has."""
    by_client: dict[str, list[Sequence]] = {}
    for s in sequences:
        by_client.setdefault(s.client, []).append(s)
    most = max(by_client.values(), key=len, default=[])
    return _youngest(most) if len(most) >= len(by_client.get(client, [])) + 2 else None
