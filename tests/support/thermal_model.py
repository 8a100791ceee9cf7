"""A board as a thermal circuit of two nodes: the die on a heat sink, the heat sink in air.

    power → [die] ─ die_to_sink ─ [heat sink] ─ sink_to_air ─ air

Power is what the board takes when idle, and what computing adds in proportion to the share of time in which
it computes. At the trip point the board throttles itself as the kernel's step-wise governor does: one step of
its clocks a second while it is above, one back while it is well below. Its dynamic power is taken as
proportional to the clock, and so are its tokens.

No board was measured for this: the ranges are plausible, and tests draw from them widely.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from edgellm.v1 import telemetry_pb2
from edgellm_agent.governor.observation import observe
from edgellm_agent.governor.policy import Governor
from edgellm_agent.governor.settings import GovernorSettings

TRIP_CELSIUS = 99.0
_STEP_S = 0.2
_STEPS_PER_RECORD = 5
# The board's own throttle.
_CLOCK_STEP, _SLOWEST_CLOCK = 0.1, 0.3
_RELEASE_CELSIUS = 3.0
_START_S = 1000.0

Load = Callable[[float], float]
"""Second → share of the time in which there is work."""


@dataclass(frozen=True)
class Board:
    """Watts, joules per kelvin, kelvins per watt."""

    idle_w: float = 6.0
    dynamic_w: float = 16.0
    die_j_per_k: float = 4.0
    sink_j_per_k: float = 60.0
    die_to_sink_k_per_w: float = 0.5
    sink_to_air_k_per_w: float = 2.6
    air_celsius: float = 35.0
    tokens_per_s: float = 20.0
    noise_celsius: float = 0.5
    quantum_celsius: float = 0.1

    def steady_celsius(self, share: float) -> float:
        """Where the die ends under a constant share of computing."""
        resistance = self.die_to_sink_k_per_w + self.sink_to_air_k_per_w
        return self.air_celsius + resistance * (self.idle_w + share * self.dynamic_w)


class Pacer(Protocol):
    """Decides the share of computing from what the board's sensors say."""

    def __call__(self, read: Callable[[], telemetry_pb2.Telemetry]) -> float: ...


@dataclass
class Capped:
    """A constant share: what an operator who knew the board would set."""

    share: float

    def __call__(self, read: Callable[[], telemetry_pb2.Telemetry]) -> float:
        return self.share


@dataclass
class Governed:
    """The governor as it is, over real records."""

    settings: GovernorSettings = field(default_factory=GovernorSettings)
    states: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._governor = Governor(self.settings, max_sequences=8, headroom_bytes=0)

    def __call__(self, read: Callable[[], telemetry_pb2.Telemetry]) -> float:
        decision = self._governor.update(observe(read(), self.settings.trip_celsius))
        self.states.append(decision.state.name)
        return decision.pace

    @property
    def changes(self) -> int:
        """How often the state changed."""
        return sum(a != b for a, b in zip(self.states, self.states[1:], strict=False))


@dataclass
class Trace:
    """One sample per second."""

    celsius: list[float] = field(default_factory=list)
    pace: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    peak_celsius: float = 0.0
    throttled_s: float = 0.0

    @property
    def crossed(self) -> bool:
        """Whether the trip point was reached at any time."""
        return self.peak_celsius >= TRIP_CELSIUS

    def tokens(self, since_s: int = 0) -> float:
        """Tokens from then on."""
        return sum(self.tokens_per_s[since_s:])


@dataclass
class Simulation:
    """A board under a load; `change` may give another board at a second: a fan fails, the sun comes out."""

    board: Board
    load: Load = lambda _: 1.0
    change: Callable[[float, Board], Board] = lambda _, board: board
    seed: int = 0
    missing: float = 0.0
    """Share of records without a temperature."""
    start_celsius: float | None = None

    def run(self, pacer: Pacer, seconds: int) -> Trace:
        """Runs it; the same seed gives the same noise."""
        rng, trace, board = random.Random(self.seed), Trace(), self.board
        sink = self._start_sink()
        die = sink + board.die_to_sink_k_per_w * board.idle_w
        clock = 1.0
        for second in range(seconds):
            board, load = self.change(second, self.board), self.load(second)
            pace = pacer(functools.partial(self._record, second, board, die, load, trace, rng))
            share = pace * load
            power_w = board.idle_w + share * clock * board.dynamic_w
            for _ in range(_STEPS_PER_RECORD):
                to_sink_w = (die - sink) / board.die_to_sink_k_per_w
                to_air_w = (sink - board.air_celsius) / board.sink_to_air_k_per_w
                die += _STEP_S * (power_w - to_sink_w) / board.die_j_per_k
                sink += _STEP_S * (to_sink_w - to_air_w) / board.sink_j_per_k
                trace.peak_celsius = max(trace.peak_celsius, die)
            tokens = share * clock * board.tokens_per_s
            trace.throttled_s += clock < 1.0
            clock = _throttle(clock, die)
            trace.celsius.append(die)
            trace.pace.append(pace)
            trace.tokens_per_s.append(tokens)
        return trace

    def best_cap(self, seconds: int, below_celsius: float = TRIP_CELSIUS) -> float:
        """The highest constant share whose peak stays below, found by bisection."""
        low, high = 0.0, 1.0
        if self.run(Capped(1.0), seconds).peak_celsius < below_celsius:
            return 1.0
        for _ in range(8):
            middle = (low + high) / 2
            if self.run(Capped(middle), seconds).peak_celsius < below_celsius:
                low = middle
            else:
                high = middle
        return low

    def _start_sink(self) -> float:
        if self.start_celsius is not None:
            return self.start_celsius
        return self.board.air_celsius + self.board.sink_to_air_k_per_w * self.board.idle_w

    def _record(
        self, second: int, board: Board, die: float, load: float, trace: Trace, rng: random.Random
    ) -> telemetry_pb2.Telemetry:
        record = telemetry_pb2.Telemetry(sequence=second + 1, monotonic_ns=int((_START_S + second) * 1e9))
        noisy = die + rng.uniform(-board.noise_celsius, board.noise_celsius)
        if rng.random() >= self.missing:
            seen = round(noisy / board.quantum_celsius) * board.quantum_celsius
            record.thermal.max_celsius = seen
            record.thermal.margin_celsius = TRIP_CELSIUS - seen
        done = trace.tokens_per_s[-1] / board.tokens_per_s if trace.tokens_per_s else 0.0
        record.power.total_mw = 1000 * (board.idle_w + done * board.dynamic_w)
        record.runtime.running_sequences = int(load > 0)
        return record


def _throttle(clock: float, die: float) -> float:
    if die >= TRIP_CELSIUS:
        return max(_SLOWEST_CLOCK, clock - _CLOCK_STEP)
    return min(1.0, clock + _CLOCK_STEP) if die < TRIP_CELSIUS - _RELEASE_CELSIUS else clock


def bursts(on_s: int, off_s: int) -> Load:
    """Work for a while, then none for a while."""
    return lambda second: float(second % (on_s + off_s) < on_s)


def fan_fails_at(at_s: float, factor: float) -> Callable[[float, Board], Board]:
    """From then on the heat sink gives its heat off so many times worse."""
    return lambda second, board: (
        board if second < at_s else replace(board, sink_to_air_k_per_w=factor * board.sink_to_air_k_per_w)
    )


def air_rises(at_s: float, over_s: float, kelvins: float) -> Callable[[float, Board], Board]:
    """The air gets hotter, evenly."""
    return lambda second, board: replace(
        board, air_celsius=board.air_celsius + kelvins * min(1.0, max(0.0, (second - at_s) / over_s))
    )
