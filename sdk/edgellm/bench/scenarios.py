"""Two loads from life: chats that grow turn by turn, and a long prompt that meets running answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.bench.load import Arrival, Bounds, Record, ask, closed_loop, unless_stopped
from edgellm.bench.metrics import Distribution, Metrics, summarize
from edgellm.bench.target import Request, Target
from edgellm.bench.workload import PromptSource
from edgellm.client import Message
from edgellm.errors import DeviceUnreachableError, EdgellmError

# Prompt of each running answer.
STREAM_INPUT_TOKENS = 32
# Gaps of each stream that are measured before the newcomer comes.
_CALM_GAPS = 16


@dataclass(frozen=True)
class Turn:
    """The figures of one turn, the first being 1, over all conversations."""

    turn: int
    metrics: Metrics
    records: Sequence[Record]


@dataclass(frozen=True)
class ChatResult:
    """All turns; with a cached prefix, TTFT stays flat while the prompts grow."""

    turns: Sequence[Turn]
    lost: DeviceUnreachableError | None = None


@dataclass(frozen=True)
class Interference:
    """What a long prompt does to running answers, and they to it, in milliseconds.

    The gaps between tokens of the running answers are split: `calm` ones lie between the start of the last
    stream and the newcomer, `during` ones overlap the time to its first token. `rounds` is how often all this
    was measured.
    """

    streams: int
    rounds: int
    avg_input_tokens: float | None
    calm_inter_token_latency_ms: Distribution | None
    during_inter_token_latency_ms: Distribution | None
    alone_time_to_first_token_ms: Distribution | None
    beside_time_to_first_token_ms: Distribution | None


async def chat(
    target: Target,
    source: PromptSource,
    stop: asyncio.Event,
    *,
    conversations: int,
    concurrency: int,
    turns: int,
    input_tokens: int,
    output_tokens: int,
    on_record: Callable[[], None] = lambda: None,
) -> ChatResult:
    """Holds conversations of several turns, each asked after the answer before it; so many at a time.

    Each turn sends the whole conversation and `input_tokens` of new text. A failed turn ends its
    conversation, and counts among the turn's errors.
    """
    by_turn: list[list[Record]] = [[] for _ in range(turns)]

    async def converse(number: int, due_s: float | None) -> Record:
        history: tuple[Message, ...] = ()
        for turn, records in enumerate(by_turn):
            text = source.prompt(number * turns + turn, input_tokens)
            asked = (*history, Message("user", text))
            record = await ask(target, Request(asked, output_tokens), due_s)
            records.append(record)
            on_record()
            if record.error is not None:
                break
            history = (*asked, Message("assistant", record.text))
        return record

    outcome = await closed_loop(converse, concurrency, Bounds(conversations), stop)
    done = [
        Turn(turn, summarize(records), records) for turn, records in enumerate(by_turn, start=1) if records
    ]
    return ChatResult(done, outcome.lost)


async def interference(
    target: Target,
    source: PromptSource,
    stop: asyncio.Event,
    *,
    streams: int,
    rounds: int,
    stream_tokens: int,
    newcomer_tokens: int,
    on_record: Callable[[], None] = lambda: None,
) -> Interference:
    """Lets `streams` answers of `stream_tokens` run while a prompt of `newcomer_tokens` comes in.

    Raises what the target raises, and EdgellmError if an answer was over before the newcomer's first token.
    """
    found = _Findings()
    numbers = itertools.count()

    def newcomer() -> Request:
        return Request(source.prompt(next(numbers), newcomer_tokens), output_tokens=1)

    def stream() -> _Stream:
        return _Stream(Request(source.prompt(next(numbers), STREAM_INPUT_TOKENS), stream_tokens))

    async def measure() -> None:
        # The first request after a pause is slower than those that follow.
        await _answered(target, newcomer())
        for _ in range(rounds):
            alone = await _answered(target, newcomer())
            on_record()
            runners = [stream() for _ in range(streams)]
            beside = await _beside(target, runners, newcomer())
            on_record()
            found.add(alone, beside, [runner.arrivals for runner in runners])

    await unless_stopped(measure(), stop)
    return found.result(streams)


@dataclass
class _Findings:
    """What the rounds brought; gaps in milliseconds."""

    alone: list[Record] = field(default_factory=list)
    beside: list[Record] = field(default_factory=list)
    calm_ms: list[float] = field(default_factory=list)
    during_ms: list[float] = field(default_factory=list)

    def add(self, alone: Record, beside: Record, streams: Sequence[Sequence[Arrival]]) -> None:
        """One round: the newcomer by itself, the newcomer beside the streams, what these got."""
        self.alone.append(alone)
        self.beside.append(beside)
        first_s = beside.arrivals[0].at_s
        # Before, the streams' own prompts were in each other's way.
        flowing_s = max(arrivals[0].at_s for arrivals in streams)
        for arrivals in streams:
            for before, after in itertools.pairwise(arrivals):
                gaps_ms = self.calm_ms if after.at_s <= beside.began_s else self.during_ms
                if flowing_s <= before.at_s < first_s:
                    gaps_ms.append((after.at_s - before.at_s) * 1e3)

    def result(self, streams: int) -> Interference:
        """The figures."""
        alone, beside = summarize(self.alone), summarize(self.beside)
        return Interference(
            streams=streams,
            rounds=len(self.beside),
            avg_input_tokens=beside.avg_input_tokens,
            calm_inter_token_latency_ms=Distribution.of(self.calm_ms),
            during_inter_token_latency_ms=Distribution.of(self.during_ms),
            alone_time_to_first_token_ms=alone.time_to_first_token_ms,
            beside_time_to_first_token_ms=beside.time_to_first_token_ms,
        )


class _Stream:
    """A running answer whose arrivals can be read while it runs."""

    def __init__(self, request: Request) -> None:
        self.arrivals: list[Arrival] = []
        self.flows = asyncio.Event()
        self._request = request

    async def run(self, target: Target) -> None:
        """Reads the whole answer."""
        clock = asyncio.get_running_loop().time
        async with contextlib.aclosing(target.generate(self._request)) as pieces:
            async for piece in pieces:
                if piece.tokens:
                    self.arrivals.append(Arrival(clock(), piece.tokens))
                if len(self.arrivals) > _CALM_GAPS:
                    self.flows.set()


async def _answered(target: Target, request: Request) -> Record:
    record = await ask(target, request)
    if record.error is not None:
        raise record.error
    return record


async def _beside(target: Target, streams: Sequence[_Stream], newcomer: Request) -> Record:
    """The newcomer's record, sent when all streams flow; they are stopped when they flow again after it."""
    tasks = [asyncio.create_task(stream.run(target)) for stream in streams]
    try:
        await _until_all_flow(streams, tasks)
        record = await _answered(target, newcomer)
        for stream in streams:
            stream.flows.clear()
        # A stall ends with the next token, which may come after the newcomer's.
        await _until_all_flow(streams, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return record


async def _until_all_flow(streams: Sequence[_Stream], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Waits for a token of each stream; raises what ended one of them, or EdgellmError if it was over."""
    flowing = asyncio.gather(*(stream.flows.wait() for stream in streams))
    waiting: list[asyncio.Future[Any]] = [flowing, *tasks]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        flowing.cancel()
        await asyncio.gather(flowing, return_exceptions=True)
    for task in tasks:
        if task.done():
            # Says why, if it failed.
            task.result()
            raise EdgellmError(
                "a running answer was over before the newcomer had its first token", "raise --output-tokens"
            )
