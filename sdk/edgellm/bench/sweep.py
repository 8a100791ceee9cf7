"""A grid of lengths and loads, measured point by point."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from edgellm.bench.load import Bounds, Outcome, Record, arrival_times, ask, closed_loop, open_loop
from edgellm.bench.metrics import Metrics, PowerSample, summarize
from edgellm.bench.target import Request, Target
from edgellm.bench.workload import PromptSource
from edgellm.errors import DeviceUnreachableError


@dataclass(frozen=True)
class Point:
    """One load: `concurrency` users in a closed loop, or `rate` requests per second in an open one.

    The first `shared_prefix_tokens` of the input are the same in all prompts. `warmup` requests go first and
    count for nothing.
    """

    input_tokens: int
    output_tokens: int
    concurrency: int | None
    rate: float | None
    bounds: Bounds
    warmup: int = 0
    shared_prefix_tokens: int = 0

    @property
    def load(self) -> float:
        """Users, or requests per second."""
        return self.rate or self.concurrency or 0

    def __str__(self) -> str:
        """As a line of progress says it."""
        who = f"{self.rate:g} req/s" if self.rate else f"{self.concurrency} at once"
        return f"{self.input_tokens} in, {self.output_tokens} out, {who}"


@dataclass(frozen=True)
class Row:
    """A measured point, with the records that its figures come from; `lost` says why it ended early."""

    point: Point
    metrics: Metrics
    records: Sequence[Record]
    lost: DeviceUnreachableError | None = None


class Sweep:
    """Measures points against one target, never with the same prompt twice.

    Args:
        target: What answers.
        source: Where prompts come from.
        stop: Set from outside to end early.
        power: Readings of the device's power, if there is a sensor; another task appends to it.
        on_record: Called after each measured request.
    """

    def __init__(
        self,
        target: Target,
        source: PromptSource,
        stop: asyncio.Event,
        *,
        power: Collection[PowerSample] = (),
        on_record: Callable[[], None] = lambda: None,
    ) -> None:
        self._target = target
        self._source = source
        self._stop = stop
        self._power = power
        self._on_record = on_record
        self._numbers = itertools.count()

    async def measure(self, point: Point) -> Row:
        """Warms up and measures one point; if the target goes away or `stop` is set, what there was."""
        outcome = await self._warm_up(point)
        if outcome.lost is None and not self._stop.is_set():
            outcome = await self._load(point)
        metrics = summarize(outcome.records, unfinished=outcome.unfinished, power=tuple(self._power))
        return Row(point, metrics, outcome.records, outcome.lost)

    async def _warm_up(self, point: Point) -> Outcome:
        async def send(_number: int, due_s: float | None) -> Record:
            return await ask(self._target, self._request(point), due_s)

        outcome = Outcome()
        if point.warmup:
            users = point.concurrency or 1
            outcome = await closed_loop(send, users, Bounds(point.warmup), self._stop)
        return Outcome(lost=outcome.lost)

    async def _load(self, point: Point) -> Outcome:
        async def send(_number: int, due_s: float | None) -> Record:
            record = await ask(self._target, self._request(point), due_s)
            self._on_record()
            return record

        if point.rate is None:
            return await closed_loop(send, point.concurrency or 1, point.bounds, self._stop)
        return await open_loop(send, arrival_times(point.rate, point.bounds, self._source.seed), self._stop)

    def _request(self, point: Point) -> Request:
        prompt = self._source.prompt(next(self._numbers), point.input_tokens, point.shared_prefix_tokens)
        return Request(prompt, point.output_tokens)
