"""One answer as it comes from a worker: deltas, credit for more, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from edgellm.v1 import worker_pb2
from edgellm_agent import errors
from edgellm_agent.engine.figures import AnswerWatch

CREDIT_TOKENS = 64
"""Tokens under way per stream: enough to hide the way there and back, little to lose when a client goes."""
_PLAIN_ERRORS: dict[worker_pb2.FailureKind.ValueType, Callable[[str], errors.AgentError]] = {
    worker_pb2.FAILURE_KIND_BUSY: errors.BusyError,
    worker_pb2.FAILURE_KIND_CANCELLED: errors.CancelledError,
    worker_pb2.FAILURE_KIND_DEADLINE: errors.DeadlineError,
    worker_pb2.FAILURE_KIND_DRAINING: errors.UnavailableError,
}


class Worker(Protocol):
    """What an answer asks of the worker that it comes from."""

    def cancel(self, stream_id: int) -> None:
        """Asks it to end a request."""

    def credit(self, stream_id: int, tokens: int) -> None:
        """Lets it send so many more tokens."""


class WorkerStream:
    """A TokenStream.

    A reader that falls behind gets what has come since in one piece; credit bounds how much that is.
    """

    def __init__(self, worker: Worker, stream_id: int, client: str, watch: AnswerWatch) -> None:
        self.client = client
        self._watch = watch
        self._worker = worker
        self._id = stream_id
        self._pending: worker_pb2.Delta | None = None
        self._error: errors.AgentError | None = None
        self._ended = False
        self._taken = 0
        self._changed = asyncio.Event()
        self.finished: worker_pb2.Finished | None = None

    def put(self, delta: worker_pb2.Delta) -> None:
        """More of the answer."""
        self._watch.came(len(delta.token_ids))
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.token_ids.extend(delta.token_ids)
            self._pending.text += delta.text
            self._pending.logprobs.extend(delta.logprobs)
        self._changed.set()

    def fail(self, error: errors.AgentError, *, by_engine: bool) -> None:
        """There will be no more; `by_engine` says that it is the engine's fault."""
        # What comes after its reader has left is neither a failure nor an answer.
        if not self._ended:
            self._watch.failed(by_engine=by_engine)
        self._error = error
        self._ended = True
        self._changed.set()

    def end(self, ended: worker_pb2.Ended) -> None:
        """The worker's last word on this request."""
        if ended.WhichOneof("outcome") == "failure":
            error = _to_error(ended.failure)
            self.fail(error, by_engine=isinstance(error, errors.EngineError))
            return
        if not self._ended:
            self._watch.finished()
        self.finished = ended.finished
        self._ended = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[worker_pb2.Delta]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            delta, self._pending = self._pending, None
            if delta is not None:
                self._give_credit(len(delta.token_ids))
                yield delta
            if self._ended and self._pending is None:
                if self._error is not None:
                    raise self._error
                return

    async def aclose(self) -> None:
        """Cancels what has not ended."""
        if not self._ended:
            self._ended = True
            self._worker.cancel(self._id)

    def _give_credit(self, tokens: int) -> None:
        # In pieces: a message for each token would cost as much as the token's own.
        self._taken += tokens
        if self._taken >= CREDIT_TOKENS // 4 and not self._ended:
            self._worker.credit(self._id, self._taken)
            self._watch.taken(self._taken)
            self._taken = 0


def _to_error(failure: worker_pb2.Failure) -> errors.AgentError:
    if failure.kind == worker_pb2.FAILURE_KIND_INVALID:
        return errors.InvalidError(failure.field, failure.message)
    if failure.kind == worker_pb2.FAILURE_KIND_TOO_LARGE:
        return errors.TooLargeError(failure.message, failure.needed_bytes, failure.available_bytes)
    return _PLAIN_ERRORS.get(failure.kind, errors.EngineError)(failure.message)
