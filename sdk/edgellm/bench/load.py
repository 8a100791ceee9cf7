"""Sends requests, by users who wait for their answers or by the clock, and records when tokens arrive.

Times are the event loop's clock (monotonic), seconds, as the client sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from edgellm.bench.target import Request, Target, Usage
from edgellm.errors import DeviceUnreachableError, RemoteError

_T = TypeVar("_T")

# Requests of an open loop that may run at once; a target that falls further behind is overloaded.
MOST_IN_FLIGHT = 512
# Failures in a row after which a run gives up: a target that refuses everything refuses it fast.
MOST_FAILURES = 100
# Requests of one run at most, however long it lasts.
MOST_REQUESTS = 100_000
# A user who is told when to come back waits so long at most, seconds.
_LONGEST_WAIT_S = 10.0


class Arrival(NamedTuple):
    """So many tokens at one moment."""

    at_s: float
    tokens: int


@dataclass(frozen=True)
class Record:
    """One request; `began_s` is when it was due, so that a late client does not flatter the target."""

    began_s: float
    ended_s: float
    arrivals: tuple[Arrival, ...] = ()
    text: str = ""
    usage: Usage = field(default_factory=Usage)
    error: RemoteError | None = None

    @property
    def output_tokens(self) -> int:
        """As the target counts them, or as they arrived if it does not say."""
        counted = self.usage.output_tokens
        return sum(tokens for _, tokens in self.arrivals) if counted is None else counted


@dataclass(frozen=True)
class Bounds:
    """When a run ends: after so many requests, or when none may start any more; at least one is needed.

    Raises ValueError if there is none.
    """

    requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.requests is None and self.duration_s is None:
            raise ValueError("a run needs a number of requests or a duration")

    @property
    def most_requests(self) -> int:
        """Requests of the run at most."""
        return MOST_REQUESTS if self.requests is None else min(self.requests, MOST_REQUESTS)


@dataclass
class Outcome:
    """What a run recorded; `unfinished` requests were stopped, `lost` says that the target went away."""

    records: list[Record] = field(default_factory=list)
    unfinished: int = 0
    lost: DeviceUnreachableError | None = None


Send = Callable[[int, "float | None"], Awaitable[Record]]


async def ask(target: Target, request: Request, due_s: float | None = None) -> Record:
    """Sends one request and reads its answer; raises DeviceUnreachableError."""
    clock = asyncio.get_running_loop().time
    began_s = clock() if due_s is None else due_s
    arrivals: list[Arrival] = []
    texts: list[str] = []
    usage, error = Usage(), None
    try:
        async with contextlib.aclosing(target.generate(request)) as pieces:
            async for piece in pieces:
                if piece.tokens:
                    arrivals.append(Arrival(clock(), piece.tokens))
                texts.append(piece.text)
                usage = piece.usage or usage
    except RemoteError as refusal:
        error = refusal
    return Record(began_s, clock(), tuple(arrivals), "".join(texts), usage, error)


async def closed_loop(send: Send, users: int, bounds: Bounds, stop: asyncio.Event) -> Outcome:
    """So many users, each of whom sends the next request when the last has ended.

    `send` gets the number of the request, from 0. When `stop` is set, running requests are cancelled.
    """
    tickets, outcome = _Tickets(bounds), Outcome()

    async def user() -> None:
        while (number := tickets.take()) is not None:
            record = await send(number, None)
            outcome.records.append(record)
            await asyncio.sleep(tickets.pause_s(record))

    return await _finish(outcome, [user() for _ in range(min(users, bounds.most_requests))], stop)


async def open_loop(send: Send, due: Sequence[float], stop: asyncio.Event) -> Outcome:
    """Sends each request when it is due, seconds from now, whether the earlier ones have ended or not.

    One that comes while MOST_IN_FLIGHT are running is not sent, and recorded with the code NOT_SENT.
    """
    outcome, loop = Outcome(), asyncio.get_running_loop()
    start_s, running = loop.time(), 0

    async def one(number: int, at_s: float) -> None:
        nonlocal running
        await asyncio.sleep(at_s - loop.time())
        if running >= MOST_IN_FLIGHT:
            refusal = RemoteError(f"{running} requests are running", code="NOT_SENT", hint="lower the rate")
            outcome.records.append(Record(at_s, at_s, error=refusal))
            return
        running += 1
        try:
            outcome.records.append(await send(number, at_s))
        finally:
            running -= 1

    return await _finish(outcome, [one(number, start_s + at) for number, at in enumerate(due)], stop)


def arrival_times(rate: float, bounds: Bounds, seed: int) -> list[float]:
    """Moments of a Poisson process with `rate` requests per second, seconds from its start."""
    rng = random.Random(f"{seed} arrivals")  # noqa: S311 - no secret
    times: list[float] = []
    at = rng.expovariate(rate)
    while len(times) < bounds.most_requests and (bounds.duration_s is None or at < bounds.duration_s):
        times.append(at)
        at += rng.expovariate(rate)
    return times


async def unless_stopped(work: Coroutine[Any, Any, _T], stop: asyncio.Event) -> _T | None:
    """The result of `work`, or None if `stop` was set before it was there."""
    task = asyncio.ensure_future(work)
    await _watch([task], stop)
    return None if task.cancelled() else task.result()


class _Tickets:
    """Numbers the requests of a closed loop, and knows when there are enough."""

    def __init__(self, bounds: Bounds) -> None:
        self._most = bounds.most_requests
        self._clock = asyncio.get_running_loop().time
        self._until_s = float("inf") if bounds.duration_s is None else self._clock() + bounds.duration_s
        self._given = 0
        self._failures = 0

    def take(self) -> int | None:
        """The next number; None if no more requests are to start."""
        enough = self._given >= self._most or self._failures >= MOST_FAILURES
        if enough or self._clock() >= self._until_s:
            return None
        self._given += 1
        return self._given - 1

    def pause_s(self, record: Record) -> float:
        """How long the user of this record waits before the next request."""
        if record.error is None:
            self._failures = 0
            return 0.0
        self._failures += 1
        wait_s = min(record.error.retry_after_s or 0.0, _LONGEST_WAIT_S)
        return max(0.0, min(wait_s, self._until_s - self._clock()))


async def _finish(
    outcome: Outcome, work: Iterable[Coroutine[Any, Any, None]], stop: asyncio.Event
) -> Outcome:
    """Runs all of `work`; ends early when `stop` is set or the target is gone."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        outcome.unfinished = await _watch(tasks, stop)
    except DeviceUnreachableError as error:
        outcome.lost = error
    return outcome


async def _watch(tasks: Sequence[asyncio.Future[Any]], stop: asyncio.Event) -> int:
    """Waits for all tasks, for `stop`, or for the first failure, which it raises; cancels what is left.

    Returns how many it cancelled.
    """
    stopping = asyncio.ensure_future(stop.wait())
    pending = set(tasks)
    try:
        while pending and not stop.is_set():
            done, _ = await asyncio.wait({*pending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            pending -= done
            for task in done - {stopping}:
                task.result()
    finally:
        for task in (*pending, stopping):
            task.cancel()
        # All of them: several may have failed at once, and one failure has been raised.
        await asyncio.gather(*tasks, stopping, return_exceptions=True)
    return sum(task.cancelled() for task in pending)
