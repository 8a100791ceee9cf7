"""Makes sequences of requests, beside the step thread.

Tokenizing a long prompt or compiling a grammar takes longer than a step; the running streams must not notice.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from edgellm.v1 import worker_pb2
from edgellm_agent.worker.sequence import Sequence

Outcome = tuple[worker_pb2.Submit, "Sequence | Exception"]


class Intake:
    """One thread that prepares requests in the order in which they come.

    What may wait here is bounded by the agent, which knows how many requests it has sent. `wake_fd` becomes
    readable when an outcome is there.
    """

    def __init__(self, prepare: Callable[[worker_pb2.Submit, float], Sequence]) -> None:
        self._prepare = prepare
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="intake")
        self._pending: dict[int, worker_pb2.Submit] = {}
        self._outcomes: deque[Outcome] = deque()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def submit(self, submit: worker_pb2.Submit, arrived: float) -> None:
        """Takes a request that arrived at that monotonic second."""
        self._pending[submit.id] = submit
        future = self._executor.submit(self._prepare, submit, arrived)
        future.add_done_callback(lambda done: self._done(submit, done))

    def cancel(self, request_id: int) -> bool:
        """Forgets a request; False if it is not here."""
        return self._pending.pop(request_id, None) is not None

    def take(self) -> list[Outcome]:
        """Sequences, or why there is none, of the requests that are ready and not cancelled."""
        # Read first: an outcome that comes after it wakes the step thread again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        taken = []
        while self._outcomes:
            submit, outcome = self._outcomes.popleft()
            if self._pending.pop(submit.id, None) is not None:
                taken.append((submit, outcome))
        return taken

    @property
    def pending(self) -> int:
        """Requests that are being prepared."""
        return len(self._pending)

    def close(self) -> None:
        """Ends the thread when it has done what it is doing."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _done(self, submit: worker_pb2.Submit, future: Future[Sequence]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._outcomes.append((submit, future.result()))
        else:
            self._outcomes.append(
                (submit, error if isinstance(error, Exception) else RuntimeError(str(error)))
            )
        os.eventfd_write(self.wake_fd, 1)
