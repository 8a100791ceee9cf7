"""Makes sequences of requests, beside the step thread.

Tokenizing a long prompt or compiling a grammar takes longer than a step; the running streams must not notice.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from edgellm.v1 import worker_pb2
from edgellm_agent.worker.sequence import Sequence

Outcome = tuple[worker_pb2.Submit, "Sequence | Exception"]


@dataclass(frozen=True)
class _Arrived:
    submit: worker_pb2.Submit
    at: float

    @property
    def deadline(self) -> float:
        return self.at + self.submit.deadline_s if self.submit.deadline_s > 0 else float("inf")


class Intake:
    """One thread that prepares requests: each client's in their order, the clients in turns.

    A request is here from `submit` until `take` gives it out or `cancel` drops it, and not after that. How
    many there may be is bounded by the agent. `wake_fd` becomes readable when an outcome is there.
    """

    def __init__(self, prepare: Callable[[worker_pb2.Submit, float], Sequence]) -> None:
        self._prepare = prepare
        self._changed = threading.Condition()
        self._pending: dict[int, _Arrived] = {}
        self._turns: OrderedDict[str, deque[int]] = OrderedDict()
        self._outcomes: deque[Outcome] = deque()
        self._closed = False
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # A worker that ends does not wait for what nobody will read.
        threading.Thread(target=self._run, name="intake", daemon=True).start()

    def submit(self, submit: worker_pb2.Submit, arrived: float) -> None:
        """Takes a request that arrived at that monotonic second."""
        with self._changed:
            self._pending[submit.id] = _Arrived(submit, arrived)
            self._turns.setdefault(submit.client, deque()).append(submit.id)
            self._changed.notify()

    def cancel(self, request_id: int) -> bool:
        """Forgets a request; False if it is not here."""
        with self._changed:
            arrived = self._pending.pop(request_id, None)
            if arrived is None:
                return False
            queue = self._turns.get(arrived.submit.client)
            if queue is not None and request_id in queue:
                queue.remove(request_id)
            return True

    def take(self) -> list[Outcome]:
        """Sequences, or why there is none, of the requests that are ready and not cancelled."""
        # Read first: an outcome that comes after it wakes the step thread again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        with self._changed:
            taken = [o for o in self._outcomes if self._pending.pop(o[0].id, None) is not None]
            self._outcomes.clear()
        return taken

    def expired(self, now: float) -> list[int]:
        """Requests whose deadline has passed."""
        with self._changed:
            return [i for i, arrived in self._pending.items() if arrived.deadline <= now]

    def next_deadline(self) -> float | None:
        """The earliest deadline, monotonic seconds."""
        with self._changed:
            earliest = min((arrived.deadline for arrived in self._pending.values()), default=float("inf"))
        return None if earliest == float("inf") else earliest

    @property
    def pending(self) -> int:
        """Requests that are being prepared."""
        return len(self._pending)

    def close(self) -> None:
        """Ends the thread when it has done what it is doing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while (arrived := self._next()) is not None:
            outcome: Sequence | Exception
            try:
                outcome = self._prepare(arrived.submit, arrived.at)
            except Exception as error:  # noqa: BLE001 - it is this request's outcome
                outcome = error
            except BaseException as error:  # noqa: BLE001 - a library's panic must not end the thread of all
                outcome = RuntimeError(f"{type(error).__name__}: {error}")
            with self._changed:
                self._outcomes.append((arrived.submit, outcome))
            os.eventfd_write(self.wake_fd, 1)

    def _next(self) -> _Arrived | None:
        with self._changed:
            while not self._closed:
                while self._turns:
                    client, queue = self._turns.popitem(last=False)
                    if queue:
                        first = queue.popleft()
                        self._turns[client] = queue
                        return self._pending[first]
                self._changed.wait()
        return None
