"""Loads that all servers get alike: mixed lengths from several clients, and chats that grow."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.serving_peers import Rival
from benchmarks.timing import Others
from edgellm.bench import Bounds, PromptSource, Record, Request, Target, ask, chat, closed_loop, fit_words
from edgellm.errors import EdgellmError

_T = TypeVar("_T")
_SEED = 20_26
_INPUT_TOKENS = (32, 64, 128, 256)
_OUTPUT_TOKENS = (16, 32, 48, 64)
# More than this share of one core, used by others or stolen by the hypervisor, disturbs a round.
_DISTURBED_CORES = 0.08
# Fewer rounds than these mean a quick look.
FEW_ROUNDS = 5
# Time for a rival's last threads to stop spinning.
_REST_S = 0.05
# A server that hangs, or is that slow, must not hold up the others.
_TURN_S = 60.0


@dataclass(frozen=True)
class Sizes:
    """How much is measured: at most so many rounds, none of which begins after `box_s`."""

    rounds: int
    box_s: float

    @classmethod
    def of(cls, rounds: int, box_s: float) -> Sizes:
        """As the command line's rounds ask for."""
        return cls(rounds=1 if rounds < FEW_ROUNDS else FEW_ROUNDS, box_s=box_s)


@dataclass(frozen=True)
class Turns:
    """What each rival gave, round by round; `dropped` says of others why they gave nothing."""

    by_name: Mapping[str, list[Any]]
    dropped: Mapping[str, str]
    disturbed: int

    @property
    def rounds(self) -> int:
        """Rounds that count."""
        return len(next(iter(self.by_name.values())))

    def __str__(self) -> str:
        """How it was measured, for the table."""
        disturbed = f", {self.disturbed} of them disturbed by others" if self.disturbed else ""
        turns = "one turn" if self.rounds == 1 else f"median of {self.rounds} turns"
        return f"{turns}{disturbed}"


def take_turns(rivals: Mapping[str, Callable[[int], _T]], sizes: Sizes) -> Turns:
    """Each rival once a round, with the number of the round; a first round does not count.

    Disturbed rounds count, unlike those of `timing.take_turns`: the time is bounded. They are reported.
    A rival that fails is dropped; raises RuntimeError if that is the first one.
    """
    results: dict[str, list[_T]] = {name: [] for name in rivals}
    dropped: dict[str, str] = {}
    disturbed, until = 0, time.monotonic() + sizes.box_s
    for number in range(sizes.rounds + 1):
        others = Others()
        for name in list(results):
            try:
                results[name].append(rivals[name](number))
            except (EdgellmError, asyncio.TimeoutError) as error:
                dropped[name] = str(error) or f"a turn took more than {_TURN_S:g} s"
                del results[name]
            time.sleep(_REST_S)
        disturbed += bool(number) and others.cores() > _DISTURBED_CORES
        if number and time.monotonic() > until:
            break
    first = next(iter(rivals))
    if first in dropped:
        raise RuntimeError(f"{first}: {dropped[first]}")
    return Turns({name: measured[1:] for name, measured in results.items()}, dropped, disturbed)


def ask_all(rival: Rival, work: Callable[[Target], Coroutine[Any, Any, _T]]) -> _T:
    """Connects, does the work in an event loop of its own, and disconnects; raises asyncio.TimeoutError."""

    async def run() -> _T:
        async with rival.connect() as target:
            return await asyncio.wait_for(work(target), _TURN_S)

    return asyncio.run(run())


def prompts_for(rival: Rival) -> PromptSource:
    """Seeded prompts, whose lengths are known by asking a rival that counts tokens."""
    return PromptSource(_SEED, ask_all(rival, lambda target: fit_words(target, _SEED)))


def mixed(source: PromptSource, turn: int, clients: int, requests: int) -> list[Request]:
    """Requests of a turn: seeded lengths, and no prompt that was there before."""
    rng = random.Random(f"{_SEED} {turn} {clients}")
    first = (turn * 100 + clients) * 100
    return [
        Request(source.prompt(first + number, rng.choice(_INPUT_TOKENS)), rng.choice(_OUTPUT_TOKENS))
        for number in range(requests)
    ]


def answer_all(rival: Rival, requests: Sequence[Request], clients: int) -> list[Record]:
    """Records of a closed loop; raises the first error, since a refused request makes the figures wrong."""

    async def work(target: Target) -> list[Record]:
        async def send(number: int, due_s: float | None) -> Record:
            return await ask(target, requests[number], due_s)

        outcome = await closed_loop(send, clients, Bounds(len(requests)), asyncio.Event())
        if outcome.lost is not None:
            raise outcome.lost
        for record in outcome.records:
            if record.error is not None:
                raise record.error
        return outcome.records

    return ask_all(rival, work)


def chat_ttfts_s(rival: Rival, source: PromptSource, turns: int) -> list[float]:
    """One conversation: seconds to the first token of each turn."""

    async def work(target: Target) -> list[float]:
        result = await chat(
            target,
            source,
            asyncio.Event(),
            conversations=1,
            concurrency=1,
            turns=turns,
            input_tokens=48,
            output_tokens=24,
        )
        if result.lost is not None:
            raise result.lost
        shown = [turn.metrics.time_to_first_token_ms for turn in result.turns]
        return [ttft.average / 1e3 for ttft in shown if ttft is not None]

    return ask_all(rival, work)
