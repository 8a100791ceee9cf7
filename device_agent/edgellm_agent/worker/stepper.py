"""Runs one step: the runner's forward pass, the choice of tokens, and what the step taught about speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edgellm.v1 import worker_pb2
from edgellm_agent.runtimes.base import Logits, ModelRunner, Row, StepBatch
from edgellm_agent.worker import answer
from edgellm_agent.worker.kv.pool import KvPool
from edgellm_agent.worker.prefill import PrefillBudget
from edgellm_agent.worker.sampler import NO_TOKEN, Choice, Draw, sample
from edgellm_agent.worker.scheduler import Batch, Work
from edgellm_agent.worker.sequence import Sequence
from edgellm_agent.worker.speculation import StepTimes
from edgellm_agent.worker.structured import GrammarError
from edgellm_agent.worker.text import TokenTable

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Tokens since the start."""

    prefill: int = 0
    generated: int = 0
    recomputed: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Outcome:
    """What a step brought: a delta for each sequence that gained something, and which have ended."""

    deltas: dict[int, worker_pb2.Delta] = field(default_factory=dict)
    finished: list[tuple[Sequence, answer.FinishReason]] = field(default_factory=list)
    failed: list[tuple[Sequence, worker_pb2.Failure]] = field(default_factory=list)

    def delta(self, sequence_id: int) -> worker_pb2.Delta:
        """The delta of a sequence."""
        return self.deltas.setdefault(sequence_id, worker_pb2.Delta(id=sequence_id))


@dataclass
class Stepper:
    """Drives a runner; knows nothing of queues and channels."""

    runner: ModelRunner
    pool: KvPool
    budget: PrefillBudget
    table: TokenTable
    times: StepTimes
    clock: Callable[[], float] = time.monotonic
    totals: Totals = field(default_factory=Totals)

    def step(self, batch: Batch) -> Outcome:
        """Computes a batch, and moves its sequences on."""
        began = self.clock()
        for timeline in (w.sequence.timeline for w in batch):
            timeline.started = timeline.started or began
        logits = self.runner.step(self._step_batch(batch))
        self._learn_speed(batch, self.clock() - began)
        for w in batch:
            self._count(w)
            w.sequence.computed = w.until
        outcome = Outcome()
        self._sample(batch, logits, outcome)
        self._learn_drafts(batch)
        for w in batch:
            self.pool.advance(w.sequence.id, w.sequence.computed)
        return outcome

    def _step_batch(self, batch: Batch) -> StepBatch:
        rows, space = [], 0
        for w in batch:
            sequence, place = w.sequence, self.pool.place(w.sequence.id)
            tokens = (*sequence.tokens[sequence.computed : w.until], *w.drafts)
            wanted = tuple(range(w.width - 1 - len(w.drafts), w.width)) if w.samples else ()
            rows.append(Row(place.slot, tokens, sequence.computed, wanted))
            space = place.space
        return StepBatch(tuple(rows), space)

    def _learn_speed(self, batch: Batch, seconds: float) -> None:
        if any(w.sequence.in_prefill for w in batch):
            self.budget.observe(sum(w.width for w in batch), seconds)
        else:
            self.times.observe(len(batch), max(w.width for w in batch), seconds)

    def _count(self, w: Work) -> None:
        sequence = w.sequence
        if sequence.in_prefill:
            again = max(0, min(w.until, sequence.computed_before) - sequence.computed)
            sequence.account.recomputed += again
            self.totals.recomputed += again
            self.totals.prefill += w.until - sequence.computed

    def _sample(self, batch: Batch, logits: Logits, outcome: Outcome) -> None:
        """Chooses each row's next token, and goes on along its drafts while the choice equals the draft."""
        position, open_rows = 0, []
        for w in batch:
            if w.samples:
                open_rows.append((w, position))
                position += 1 + len(w.drafts)
        depth = 0
        while open_rows:
            draws = {w.sequence.id: d for w, _ in open_rows if (d := _draw(w.sequence, outcome)) is not None}
            open_rows = [row for row in open_rows if row[0].sequence.id in draws]
            wanted = [first + depth for _, first in open_rows]
            rows = logits if len(wanted) == len(logits) else logits[wanted]
            choices = sample(rows, list(draws.values()))
            open_rows = [
                row
                for row, choice in zip(open_rows, choices, strict=True)
                if self._take(row[0], choice, depth, outcome)
            ]
            depth += 1

    def _take(self, w: Work, choice: Choice, depth: int, outcome: Outcome) -> bool:
        """Adds a choice to the answer; tells whether the next draft is still to be verified."""
        sequence = w.sequence
        if choice.token == NO_TOKEN:
            what = "the engine computed no finite logits"
            if sequence.matcher is not None:
                what = "nothing that the constraint allows is left, or " + what
            _fail(outcome, sequence, worker_pb2.FAILURE_KIND_INTERNAL, what)
            return False
        now = self.clock()
        sequence.timeline.first_token = sequence.timeline.first_token or now
        sequence.timeline.last_token = now
        before = sequence.generated
        try:
            reason = answer.append(sequence, choice, outcome.delta(sequence.id), self.table)
        except Exception as error:  # noqa: BLE001 - it must end this answer and no other
            _fail_with(outcome, sequence, error)
            return False
        self.totals.generated += sequence.generated - before
        if reason:
            outcome.finished.append((sequence, reason))
            return False
        if depth == len(w.drafts) or choice.token != w.drafts[depth]:
            return False
        sequence.computed += 1
        sequence.account.accepted += 1
        self.totals.accepted += 1
        return True

    def _learn_drafts(self, batch: Batch) -> None:
        """Tells the guessers how well they did, and whether it was worth the wider step."""
        if not any(w.drafts for w in batch):
            return
        tokens = sum(w.sequence.computed - w.until + 1 for w in batch)
        paid = self.times.pays(len(batch), max(w.width for w in batch), tokens)
        for w in batch:
            if w.drafts:
                drafted, accepted = len(w.drafts), w.sequence.computed - w.until
                w.sequence.account.drafted += drafted
                self.totals.drafted += drafted
                w.sequence.lookup.observe(len(w.sequence.tokens), drafted, accepted, paid=paid)


def _draw(sequence: Sequence, outcome: Outcome) -> Draw | None:
    """What the sampler must know of a sequence; None if its grammar cannot go on."""
    try:
        return answer.draw(sequence)
    except Exception as error:  # noqa: BLE001 - it must end this answer and no other
        _fail_with(outcome, sequence, error)
        return None


def _fail_with(outcome: Outcome, sequence: Sequence, error: Exception) -> None:
    if isinstance(error, GrammarError):
        _fail(outcome, sequence, worker_pb2.FAILURE_KIND_INVALID, str(error), field="constraint")
    else:
        log.exception("request %d cannot go on", sequence.id, exc_info=error)
        _fail(outcome, sequence, worker_pb2.FAILURE_KIND_INTERNAL, f"the answer cannot go on: {error}")


def _fail(
    outcome: Outcome,
    sequence: Sequence,
    kind: worker_pb2.FailureKind.ValueType,
    message: str,
    field: str = "",
) -> None:
    outcome.failed.append((sequence, worker_pb2.Failure(kind=kind, message=message, field=field)))
