"""The worker's loop: take messages, schedule, run a step, sample, stream.

All but the preparation of requests is done in one thread, so nothing needs a lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgellm.v1 import device_pb2, worker_pb2
from edgellm_agent.ipc import WorkerChannel
from edgellm_agent.worker import answer
from edgellm_agent.worker.intake import Intake
from edgellm_agent.worker.kv.pool import TooLargeError
from edgellm_agent.worker.pace import Pace
from edgellm_agent.worker.scheduler import Batch, Scheduler
from edgellm_agent.worker.sequence import Sequence
from edgellm_agent.worker.stepper import Stepper
from edgellm_agent.worker.text import PromptError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """What the loop drives."""

    plan: device_pb2.MemoryPlan
    intake: Intake
    scheduler: Scheduler
    stepper: Stepper


class EngineLoop:
    """Answers the agent's messages until the channel closes."""

    def __init__(
        self, engine: LoadedEngine, channel: WorkerChannel, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._channel = channel
        self._clock = clock
        self._pace = Pace(clock)
        self._busy = False
        self._cached_total = 0
        self._draining = False
        self._drained_sent = False

    def run(self) -> None:
        """Runs until the agent closes the channel (EOFError)."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Takes what has come, waiting for it if there is nothing to compute yet, and computes one turn."""
        for message in self._channel.receive(self._wait_s(), self._engine.intake.wake_fd):
            self._handle(message)
        for submit, outcome in self._engine.intake.take():
            self._enter(submit, outcome)
        self._end_overdue()
        if self._pace.rest_s():
            # A message or a deadline came before the rest was over.
            self._busy = True
        else:
            self._busy = self._compute()
        self._tell_if_drained()

    def _compute(self) -> bool:
        """One turn of the runner; tells whether there may be more to do."""
        preempted = self._scheduler.preemptions_total
        self._pace.begin()
        work = self._scheduler.schedule()
        for batch in work:
            self._step(batch)
        if work:
            self._pace.end()
        # What was preempted just now may find its place in the next turn.
        return bool(work) or self._scheduler.preemptions_total > preempted

    def _wait_s(self) -> float | None:
        """How long to wait for a message: for the rest that the pace demands, or until a deadline passes."""
        rest_s = self._pace.rest_s() if self._busy else None
        if rest_s == 0:
            return 0
        known = (self._scheduler.next_deadline(), self._engine.intake.next_deadline())
        deadlines = [max(0.0, d - self._clock()) for d in known if d is not None]
        return min(deadlines if rest_s is None else [*deadlines, rest_s], default=None)

    def _handle(self, message: worker_pb2.ToWorker) -> None:
        match message.WhichOneof("message"):
            case "submit":
                self._submit(message.submit)
            case "cancel":
                self._cancel(message.cancel.id)
            case "credit":
                sequence = self._scheduler.find(message.credit.id)
                if sequence is not None:
                    sequence.credit += message.credit.tokens
            case "set_limits":
                self._set_limits(message.set_limits)
            case "drain":
                self._draining = True
            case "ping":
                self._channel.send(worker_pb2.FromWorker(stats=self._stats()))
            case other:
                raise ValueError(f"message {other} makes no sense after Load")

    def _submit(self, submit: worker_pb2.Submit) -> None:
        if self._draining:
            self._send_failure(
                submit.id, worker_pb2.FAILURE_KIND_DRAINING, "the engine takes no new requests"
            )
        else:
            self._engine.intake.submit(submit, self._clock())

    def _cancel(self, request_id: int) -> None:
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._scheduler.remove(sequence, keep=True)
        elif not self._engine.intake.cancel(request_id):
            return
        self._send_failure(request_id, worker_pb2.FAILURE_KIND_CANCELLED, "the client cancelled the request")

    def _set_limits(self, limits: worker_pb2.SetLimits) -> None:
        plan = self._engine.plan
        self._scheduler.resize(
            min(limits.kv_bytes, plan.kv_bytes), min(max(1, limits.max_sequences), plan.max_sequences)
        )
        self._pace.set_share(limits.pace)

    def _enter(self, submit: worker_pb2.Submit, outcome: Sequence | Exception) -> None:
        """Queues a prepared request, or tells why it cannot be."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            refused = self._scheduler.add(outcome)
        except PromptError as error:
            self._send_failure(submit.id, worker_pb2.FAILURE_KIND_INVALID, str(error), field=error.field)
        except TooLargeError as error:
            self._send_failure(
                submit.id,
                worker_pb2.FAILURE_KIND_TOO_LARGE,
                str(error),
                needed_bytes=error.needed_bytes,
                available_bytes=error.available_bytes,
            )
        except Exception as error:
            log.exception("request %d could not be prepared", submit.id)
            self._send_failure(submit.id, worker_pb2.FAILURE_KIND_INTERNAL, type(error).__name__)
        else:
            if refused is not None:
                self._send_failure(refused.id, worker_pb2.FAILURE_KIND_BUSY, "too many requests are waiting")

    def _end_overdue(self) -> None:
        late = "the request's deadline has passed"
        for request_id in self._engine.intake.expired(self._clock()):
            self._engine.intake.cancel(request_id)
            self._send_failure(request_id, worker_pb2.FAILURE_KIND_DEADLINE, late)
        for sequence in self._scheduler.expired(self._clock()):
            self._fail(sequence, worker_pb2.FAILURE_KIND_DEADLINE, late)
        for sequence in self._scheduler.hopeless():
            # Not for good: the bound grows again, so it is worth another try.
            self._fail(
                sequence,
                worker_pb2.FAILURE_KIND_BUSY,
                "the device is short of memory, and its KV cache has shrunk",
            )

    def _step(self, batch: Batch) -> None:
        for w in batch:
            if w.sequence.in_prefill:
                new = w.until - max(w.sequence.computed, w.sequence.computed_before)
                self._scheduler.served(w.sequence, prompt_tokens=max(0, new))
        outcome = self._engine.stepper.step(batch)
        for w in batch:
            delta = outcome.deltas.get(w.sequence.id)
            if delta is not None:
                self._scheduler.served(w.sequence, answer_tokens=len(delta.token_ids))
        deltas = [d for d in outcome.deltas.values() if d.token_ids or d.text]
        if deltas:
            self._channel.send(worker_pb2.FromWorker(step=worker_pb2.Step(deltas=deltas)))
        for sequence, reason in outcome.finished:
            self._cached_total += sequence.account.cached
            finished = answer.finished(sequence, reason, self._scheduler.remove(sequence, keep=True))
            self._send_ended(worker_pb2.Ended(id=sequence.id, finished=finished))
        for sequence, failure in outcome.failed:
            self._scheduler.remove(sequence)
            self._send_ended(worker_pb2.Ended(id=sequence.id, failure=failure))

    def _fail(self, sequence: Sequence, kind: worker_pb2.FailureKind.ValueType, message: str) -> None:
        self._scheduler.remove(sequence, keep=True)
        self._send_failure(sequence.id, kind, message)

    def _send_failure(
        self, request_id: int, kind: worker_pb2.FailureKind.ValueType, message: str, **details: object
    ) -> None:
        failure = worker_pb2.Failure(kind=kind, message=message, **details)  # type: ignore[arg-type]
        self._send_ended(worker_pb2.Ended(id=request_id, failure=failure))

    def _send_ended(self, ended: worker_pb2.Ended) -> None:
        self._channel.send(worker_pb2.FromWorker(ended=ended))

    def _tell_if_drained(self) -> None:
        left = self._scheduler.running + self._scheduler.waiting + self._engine.intake.pending
        if self._draining and not left and not self._drained_sent:
            self._drained_sent = True
            self._channel.send(worker_pb2.FromWorker(drained=worker_pb2.Drained()))

    def _stats(self) -> worker_pb2.Stats:
        kv, totals = self._engine.stepper.pool.stats(), self._engine.stepper.totals
        return worker_pb2.Stats(
            running_sequences=self._scheduler.running,
            waiting_requests=self._scheduler.waiting + self._engine.intake.pending,
            max_sequences=self._scheduler.limits.max_sequences,
            kv_used_bytes=kv.used_bytes,
            kv_cached_bytes=kv.cached_bytes,
            kv_promised_bytes=kv.promised_bytes,
            kv_bound_bytes=kv.bound_bytes,
            prefill_tokens_total=totals.prefill,
            generated_tokens_total=totals.generated,
            cached_tokens_total=self._cached_total,
            recomputed_tokens_total=totals.recomputed,
            draft_tokens_total=totals.drafted,
            accepted_draft_tokens_total=totals.accepted,
            preemptions_total=self._scheduler.preemptions_total,
        )
