"""The worker's loop: take messages, schedule, run a step, sample, stream.

Everything in one thread, so nothing needs a lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgellm.bundle.config import EngineConfig
from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent.ipc import WorkerChannel
from edgellm_agent.runtimes.base import ModelRunner, Row, StepBatch
from edgellm_agent.worker.kv_pool import KvPool, TooLargeError
from edgellm_agent.worker.requests import Room, make_sequence
from edgellm_agent.worker.sampler import sample
from edgellm_agent.worker.scheduler import QueueFullError, Scheduler, Work
from edgellm_agent.worker.sequence import Sequence
from edgellm_agent.worker.text import PromptError, TextModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedEngine:
    """What the loop drives."""

    config: EngineConfig
    room: Room
    runner: ModelRunner
    text: TextModel
    pool: KvPool
    scheduler: Scheduler


class EngineLoop:
    """Answers the agent's messages until the channel closes."""

    def __init__(
        self, engine: LoadedEngine, channel: WorkerChannel, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._channel = channel
        self._clock = clock
        self._draining = False
        self._drained_sent = False
        self._prefill_tokens_total = 0
        self._generated_tokens_total = 0

    def run(self) -> None:
        """Runs until the agent closes the channel (EOFError)."""
        work: list[Work] = []
        while True:
            for message in self._channel.receive(0 if work else self._idle_s()):
                self._handle(message)
            for sequence in self._scheduler.expired(self._clock()):
                self._fail(sequence, worker_pb2.FAILURE_KIND_DEADLINE, "the request's deadline has passed")
            work = self._scheduler.schedule()
            if work:
                self._step(work)
            self._tell_if_drained()

    def _idle_s(self) -> float | None:
        deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())

    def _handle(self, message: worker_pb2.ToWorker) -> None:
        match message.WhichOneof("message"):
            case "submit":
                self._submit(message.submit)
            case "cancel":
                sequence = self._scheduler.find(message.cancel.id)
                if sequence is not None:
                    self._fail(
                        sequence, worker_pb2.FAILURE_KIND_CANCELLED, "the client cancelled the request"
                    )
            case "credit":
                sequence = self._scheduler.find(message.credit.id)
                if sequence is not None:
                    sequence.credit += message.credit.tokens
            case "drain":
                self._draining = True
            case "ping":
                self._channel.send(worker_pb2.FromWorker(stats=self._stats()))
            case other:
                raise ValueError(f"message {other} makes no sense after Load")

    def _submit(self, submit: worker_pb2.Submit) -> None:
        def refuse(kind: worker_pb2.FailureKind.ValueType, message: str, **details: object) -> None:
            failure = worker_pb2.Failure(kind=kind, message=message, **details)  # type: ignore[arg-type]
            self._send_ended(worker_pb2.Ended(id=submit.id, failure=failure))

        if self._draining:
            refuse(worker_pb2.FAILURE_KIND_DRAINING, "the engine takes no new requests")
            return
        try:
            engine = self._engine
            self._scheduler.add(make_sequence(submit, engine.text, engine.config, engine.room, self._clock()))
        except PromptError as error:
            refuse(worker_pb2.FAILURE_KIND_INVALID, str(error), field=error.field)
        except TooLargeError as error:
            refuse(
                worker_pb2.FAILURE_KIND_TOO_LARGE,
                str(error),
                needed_bytes=error.needed_bytes,
                available_bytes=error.available_bytes,
            )
        except QueueFullError:
            refuse(worker_pb2.FAILURE_KIND_BUSY, "too many requests are waiting")

    def _step(self, work: list[Work]) -> None:
        now = self._clock()
        for sequence in (w.sequence for w in work if w.sequence.timeline.started == 0):
            sequence.timeline.started = now
        logits = self._engine.runner.step(StepBatch(tuple(self._row(w) for w in work)))
        for w in work:
            if w.sequence.in_prefill:
                self._prefill_tokens_total += w.until - w.sequence.computed
            w.sequence.computed = w.until
            self._engine.pool.grow(w.sequence.id, w.until)
        sampled = [w.sequence for w in work if w.samples]
        if not sampled:
            return
        tokens = sample(logits, sampled)
        now = self._clock()
        step = worker_pb2.Step()
        ended: list[tuple[Sequence, inference_pb2.FinishReason.ValueType]] = []
        for sequence, token, row in zip(sampled, tokens, logits, strict=True):
            if not np.isfinite(row[token]):
                self._fail(sequence, worker_pb2.FAILURE_KIND_INTERNAL, "the engine computed no finite logits")
                continue
            reason = self._append(sequence, token, now, step)
            if reason:
                ended.append((sequence, reason))
        if step.deltas:
            self._channel.send(worker_pb2.FromWorker(step=step))
        for sequence, reason in ended:
            self._finish(sequence, reason)

    def _row(self, work: Work) -> Row:
        sequence = work.sequence
        tokens = sequence.tokens[sequence.computed : work.until]
        wanted = (len(tokens) - 1,) if work.samples else ()
        return Row(self._engine.pool.slot(sequence.id), tokens, sequence.computed, wanted)

    def _append(
        self, sequence: Sequence, token: int, now: float, step: worker_pb2.Step
    ) -> inference_pb2.FinishReason.ValueType:
        """Adds a token to a sequence and its delta to the step; tells why the sequence ends, if it does."""
        timeline = sequence.timeline
        timeline.first_token = timeline.first_token or now
        timeline.last_token = now
        if token in sequence.eos_ids:
            reason = inference_pb2.FINISH_REASON_STOP
            text = sequence.text.finish()
            if text:
                step.deltas.add(id=sequence.id, text=text)
            return reason
        sequence.tokens.append(token)
        sequence.credit -= 1
        self._generated_tokens_total += 1
        text = sequence.text.push(token)
        reason = inference_pb2.FINISH_REASON_UNSPECIFIED
        if sequence.text.stopped:
            reason = inference_pb2.FINISH_REASON_STOP
        elif sequence.generated == sequence.max_tokens:
            reason = inference_pb2.FINISH_REASON_LENGTH
            text += sequence.text.finish()
        step.deltas.add(id=sequence.id, token_ids=[token], text=text)
        return reason

    def _finish(self, sequence: Sequence, reason: inference_pb2.FinishReason.ValueType) -> None:
        _, kv_bytes = self._scheduler.remove(sequence.id) or (sequence, 0)
        t = sequence.timeline
        finished = worker_pb2.Finished(
            reason=reason,
            usage=inference_pb2.Usage(
                prompt_tokens=sequence.prompt_tokens, completion_tokens=sequence.generated, kv_bytes=kv_bytes
            ),
            timings=inference_pb2.Timings(
                queue_s=t.started - t.arrived,
                ttft_s=t.first_token - t.arrived,
                decode_s=t.last_token - t.first_token,
            ),
        )
        self._send_ended(worker_pb2.Ended(id=sequence.id, finished=finished))

    def _fail(self, sequence: Sequence, kind: worker_pb2.FailureKind.ValueType, message: str) -> None:
        self._scheduler.remove(sequence.id)
        failure = worker_pb2.Failure(kind=kind, message=message)
        self._send_ended(worker_pb2.Ended(id=sequence.id, failure=failure))

    def _send_ended(self, ended: worker_pb2.Ended) -> None:
        self._channel.send(worker_pb2.FromWorker(ended=ended))

    def _tell_if_drained(self) -> None:
        empty = self._scheduler.running == 0 and self._scheduler.waiting == 0
        if self._draining and empty and not self._drained_sent:
            self._drained_sent = True
            self._channel.send(worker_pb2.FromWorker(drained=worker_pb2.Drained()))

    def _stats(self) -> worker_pb2.Stats:
        kv = self._engine.pool.stats()
        return worker_pb2.Stats(
            running_sequences=self._scheduler.running,
            waiting_requests=self._scheduler.waiting,
            kv_used_bytes=kv.used_bytes,
            kv_promised_bytes=kv.promised_bytes,
            kv_bound_bytes=kv.bound_bytes,
            prefill_tokens_total=self._prefill_tokens_total,
            generated_tokens_total=self._generated_tokens_total,
        )
