"""One benchmark of one device: from settings to results, whatever ends it."""

from __future__ import annotations

import asyncio
import secrets
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from edgellm.bench.device import DeviceTarget, PowerMeter, System, describe
from edgellm.bench.load import Bounds, unless_stopped
from edgellm.bench.metrics import PowerSample
from edgellm.bench.scenarios import STREAM_INPUT_TOKENS, ChatResult, Interference, chat, interference
from edgellm.bench.sweep import Point, Row, Sweep
from edgellm.bench.target import Target
from edgellm.bench.workload import SAFE_WORDS, PromptSource, fit_words
from edgellm.client import AsyncClient
from edgellm.errors import DeviceUnreachableError, EdgellmError

_LEAST_REQUESTS, _REQUESTS_PER_USER = 8, 4
_ROUNDS = 5
_PROBE_WORDS = 256


class Scenario(str, Enum):
    """What is sent."""

    SWEEP = "sweep"
    CHAT = "chat"
    INTERFERENCE = "interference"


@dataclass(frozen=True)
class Settings:
    """What to measure: every combination of lengths and loads, in this order.

    `rates`, requests per second, make an open loop in place of `concurrency`. `requests` of None is a number
    that suits the load. A `seed` of None is a new one, so that a repetition finds no prompt in the KV cache.
    """

    device: str
    scenario: Scenario = Scenario.SWEEP
    model: str = ""
    input_tokens: tuple[int, ...] = (128,)
    output_tokens: tuple[int, ...] = (128,)
    concurrency: tuple[int, ...] = (1, 4)
    rates: tuple[float, ...] = ()
    requests: int | None = None
    duration_s: float | None = None
    warmup: int = 2
    shared_prefix_tokens: int = 0
    turns: int = 4
    seed: int | None = None
    timeout_s: float = 600.0

    def points(self) -> list[Point]:
        """The combinations."""
        loads: list[tuple[int | None, float | None]] = [(None, rate) for rate in self.rates]
        loads = loads or [(users, None) for users in self.concurrency]
        return [
            Point(
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                concurrency=users,
                rate=rate,
                bounds=Bounds(self._requests(users), self.duration_s),
                warmup=self.warmup,
                shared_prefix_tokens=self.shared_prefix_tokens,
            )
            for input_tokens in self.input_tokens
            for output_tokens in self.output_tokens
            for users, rate in loads
        ]

    def requests_in_all(self) -> int | None:
        """Measured requests of all points; None if time is the only bound."""
        counts = [point.bounds.requests for point in self.points()]
        each = {Scenario.SWEEP: 1, Scenario.CHAT: self.turns, Scenario.INTERFERENCE: 2}[self.scenario]
        return None if None in counts else each * sum(count or 0 for count in counts)

    def command(self, point: Point) -> str:
        """The command line that measures one point again."""
        options: list[tuple[str, object]] = [
            ("device", self.device),
            ("scenario", self.scenario.value),
            ("model", self.model or None),
            ("input-tokens", point.input_tokens),
            ("output-tokens", point.output_tokens),
            ("concurrency", point.concurrency),
            ("rate", point.rate),
            ("requests", point.bounds.requests),
            ("duration", point.bounds.duration_s),
            ("warmup", point.warmup if self.scenario is Scenario.SWEEP else None),
            ("shared-prefix", point.shared_prefix_tokens or None),
            ("turns", self.turns if self.scenario is Scenario.CHAT else None),
            ("timeout", self.timeout_s),
            ("seed", self.seed),
        ]
        given = [f"--{name}={value}" for name, value in options if value is not None]
        return shlex.join(["edgellm", "bench", *given])

    def _requests(self, users: int | None) -> int | None:
        if self.requests is not None:
            return self.requests
        if self.scenario is Scenario.INTERFERENCE:
            return _ROUNDS
        if self.scenario is Scenario.CHAT:
            return users
        return None if self.duration_s else max(_LEAST_REQUESTS, _REQUESTS_PER_USER * (users or 0))


@dataclass(frozen=True)
class ChatRow:
    """A measured chat."""

    point: Point
    result: ChatResult
    lost: DeviceUnreachableError | None = None


@dataclass(frozen=True)
class InterferenceRow:
    """A measured interference."""

    point: Point
    result: Interference
    lost: DeviceUnreachableError | None = None


Measured = Row | ChatRow | InterferenceRow


@dataclass
class Findings:
    """What was measured, up to the end or to what ended it: `failure`, or a stop from outside."""

    settings: Settings
    system: System | None = None
    rows: list[Measured] = field(default_factory=list)
    failure: EdgellmError | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Progress:
    """What to call while a benchmark runs."""

    on_point: Callable[[Point], None] = lambda _point: None
    on_record: Callable[[], None] = lambda: None


async def run(settings: Settings, stop: asyncio.Event, progress: Progress | None = None) -> Findings:
    """Measures all points, until the last one, a failure, or `stop`."""
    findings = Findings(settings)
    try:
        async with AsyncClient.for_device(settings.device) as client:
            findings.system = await unless_stopped(describe(client, settings.model), stop)
            if findings.system is not None:
                _check(settings, findings.system)
                await _measure(findings, findings.system, client, stop, progress or Progress())
    except EdgellmError as error:
        findings.failure = error
    findings.stopped = stop.is_set()
    return findings


async def _measure(
    findings: Findings, system: System, client: AsyncClient, stop: asyncio.Event, progress: Progress
) -> None:
    settings = findings.settings
    target = DeviceTarget(client, model=settings.model, timeout_s=settings.timeout_s)
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    # A longer probe counts better; even as bytes a word has five tokens.
    most_words = max(SAFE_WORDS, min(_PROBE_WORDS, system.context_tokens // 6))
    fit = await unless_stopped(fit_words(target, seed, most_words), stop)
    if fit is None:
        return
    async with PowerMeter(client) as meter:
        runner = _Runner(settings, target, PromptSource(seed, fit), stop, progress, meter.samples)
        for number, point in enumerate(settings.points()):
            if stop.is_set():
                return
            progress.on_point(point)
            row = await runner.measure(number, point)
            if _has_figures(row):
                findings.rows.append(row)
            if row.lost is not None:
                raise row.lost
    _check_answered(findings.rows)


@dataclass(frozen=True)
class _Runner:
    """All that the points of one benchmark have in common."""

    settings: Settings
    target: Target
    source: PromptSource
    stop: asyncio.Event
    progress: Progress
    power: Collection[PowerSample]

    async def measure(self, number: int, point: Point) -> Measured:
        """One point; each has prompts of its own, since those before may have left theirs in the KV cache."""
        source = PromptSource(self.source.seed + number, self.source.fit)
        if self.settings.scenario is Scenario.CHAT:
            return await self._chat(source, point)
        if self.settings.scenario is Scenario.INTERFERENCE:
            return await self._interference(source, point)
        on_record = self.progress.on_record
        sweep = Sweep(self.target, source, self.stop, power=self.power, on_record=on_record)
        return await sweep.measure(point)

    async def _chat(self, source: PromptSource, point: Point) -> ChatRow:
        result = await chat(
            self.target,
            source,
            self.stop,
            conversations=point.bounds.most_requests,
            concurrency=point.concurrency or 1,
            turns=self.settings.turns,
            input_tokens=point.input_tokens,
            output_tokens=point.output_tokens,
            on_record=self.progress.on_record,
        )
        return ChatRow(point, result, result.lost)

    async def _interference(self, source: PromptSource, point: Point) -> InterferenceRow:
        result = await interference(
            self.target,
            source,
            self.stop,
            streams=point.concurrency or 1,
            rounds=point.bounds.most_requests,
            stream_tokens=point.output_tokens,
            newcomer_tokens=point.input_tokens,
            on_record=self.progress.on_record,
        )
        return InterferenceRow(point, result)


def _has_figures(row: Measured) -> bool:
    """Whether anything was measured before the row ended."""
    if isinstance(row, Row):
        return bool(row.records)
    return bool(row.result.turns if isinstance(row, ChatRow) else row.result.rounds)


def _check_answered(rows: Sequence[Measured]) -> None:
    """Raises the first refusal if there was nothing else."""
    records = [
        record
        for row in rows
        if not isinstance(row, InterferenceRow)
        for part in ([row] if isinstance(row, Row) else row.result.turns)
        for record in part.records
    ]
    refusals = [record.error for record in records if record.error is not None]
    if refusals and len(refusals) == len(records):
        raise refusals[0]


def _longest(settings: Settings) -> int:
    """Tokens of the longest request, prompt and answer."""
    input_tokens, output_tokens = max(settings.input_tokens), max(settings.output_tokens)
    if settings.scenario is Scenario.INTERFERENCE:
        return max(input_tokens + 1, STREAM_INPUT_TOKENS + output_tokens)
    return (settings.turns if settings.scenario is Scenario.CHAT else 1) * (input_tokens + output_tokens)


def _check(settings: Settings, system: System) -> None:
    """Raises EdgellmError for what cannot be measured there, before anything is sent."""
    longest, chatting = _longest(settings), settings.scenario is Scenario.CHAT
    if longest > system.context_tokens:
        raise EdgellmError(
            f"requests of {longest} tokens, prompt and answer, exceed the context of {system.context_tokens}",
            "lower --input-tokens or --output-tokens" + (" or --turns" if chatting else ""),
        )
    crowd = max(settings.concurrency, default=0) + 1
    if settings.scenario is Scenario.INTERFERENCE and crowd > system.max_sequences:
        raise EdgellmError(
            f"a newcomer beside {crowd - 1} streams would wait: "
            f"the device runs {system.max_sequences} requests at once",
            f"lower --concurrency to {system.max_sequences - 1} or less",
        )
