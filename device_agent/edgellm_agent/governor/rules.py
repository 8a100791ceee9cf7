"""What each figure demands: a state, and how much the engine may do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from edgellm_agent.engine.pressure import Pressure, Reading
from edgellm_agent.governor.control import ShareController
from edgellm_agent.governor.observation import Observation
from edgellm_agent.governor.states import Ladder, State

_POWER_WEIGHT_S = 5.0
# After an over-current event the pace falls to this part, and rises again by so much a second.
_OVER_CURRENT_FACTOR = 0.7
_OVER_CURRENT_RECOVERY_PER_S = 0.005
# Memory: half as many at once each time, not before the last step can have shown; one more after a while.
_MEMORY_FALL_S = 5.0
_MEMORY_RISE_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """What one rule demands."""

    state: State = State.NOMINAL
    pace: float = 1.0
    max_sequences: int | None = None


@dataclass(frozen=True)
class Moment:
    """An observation, how long it stands for, and the pace that led to it."""

    seen: Observation
    seconds: float
    pace: float

    def proves_room(self, output: float) -> bool:
        """Whether what is seen was seen under the load that this output allows."""
        return self.seen.busy and self.pace >= output - 0.01


class Rule(Protocol):
    """Looks at one figure."""

    reason: str

    def update(self, moment: Moment) -> Verdict:
        """What it demands now; called once per record."""


@dataclass
class PowerRule:
    """Keeps the mean power of the last seconds at the budget."""

    budget_mw: float
    controller: ShareController
    reason: str = "power"
    _mean_mw: float | None = None
    _ladder: Ladder = field(default_factory=Ladder)

    def update(self, moment: Moment) -> Verdict:
        """WARM while the budget limits, HOT while the mean is above it by more than a tenth."""
        power_mw = moment.seen.power_mw
        if power_mw is not None:
            weight = min(1.0, moment.seconds / _POWER_WEIGHT_S)
            before = power_mw if self._mean_mw is None else self._mean_mw
            self._mean_mw = before + weight * (power_mw - before)
            room = 1.0 - self._mean_mw / self.budget_mw
            may_rise = moment.proves_room(self.controller.output)
            self.controller.update(room, moment.seconds, may_rise=may_rise)
        above = self._mean_mw is not None and self._mean_mw > 1.1 * self.budget_mw
        limited = State.WARM if self.controller.output < 1.0 else State.NOMINAL
        wanted = State.HOT if above else limited
        return Verdict(self._ladder.update(moment.seen.at_s, wanted), self.controller.output)


@dataclass
class OverCurrentRule:
    """Additive increase, multiplicative decrease: the board says that it was too much, not by how much."""

    floor: float
    reason: str = "over_current"
    _events: dict[str, int] = field(default_factory=dict)
    _ceiling: float = 1.0
    _ladder: Ladder = field(default_factory=Ladder)

    def update(self, moment: Moment) -> Verdict:
        """HOT after an event, WARM while the pace recovers."""
        if self._new_events(moment.seen):
            self._ceiling = max(self.floor, _OVER_CURRENT_FACTOR * min(self._ceiling, moment.pace))
            wanted = State.HOT
        else:
            self._ceiling = min(1.0, self._ceiling + _OVER_CURRENT_RECOVERY_PER_S * moment.seconds)
            wanted = State.WARM if self._ceiling < 1.0 else State.NOMINAL
        return Verdict(self._ladder.update(moment.seen.at_s, wanted), self._ceiling)

    def _new_events(self, seen: Observation) -> bool:
        new = False
        for kind, events in seen.over_current.items():
            before = self._events.get(kind, events)
            # A counter that went back began anew: all that it counts now came since.
            new |= events > before or 0 < events < before
            self._events[kind] = events
        return new


@dataclass
class MemoryRule:
    """Fewer requests at once while others on the board need memory.

    Memory is judged as for the bound of the KV cache (`engine.pressure`). That gives bytes back at once; this
    keeps requests from competing for what is left.
    """

    headroom_bytes: int
    most: int
    reason: str = "memory"
    _admitted: int = field(init=False)
    _changed_at_s: float | None = None
    _ladder: Ladder = field(default_factory=Ladder)

    def __post_init__(self) -> None:
        """Begins with all."""
        self._admitted = self.most

    def update(self, moment: Moment) -> Verdict:
        """HOT under pressure, WARM until as many as before may run again."""
        seen = moment.seen
        if seen.available_bytes is None:
            return Verdict(self._ladder.state, max_sequences=self._admitted)
        pressure = Pressure.of(Reading(seen.available_bytes, seen.stalled_percent), self.headroom_bytes)
        if self._changed_at_s is None:
            self._changed_at_s = seen.at_s - _MEMORY_FALL_S
        passed_s = seen.at_s - self._changed_at_s
        if pressure is Pressure.HIGH and passed_s >= _MEMORY_FALL_S:
            self._admitted, self._changed_at_s = max(1, self._admitted // 2), seen.at_s
        elif pressure is Pressure.NONE and passed_s >= _MEMORY_RISE_S:
            self._admitted, self._changed_at_s = min(self.most, self._admitted + 1), seen.at_s
        wanted = State.HOT if pressure is Pressure.HIGH else State.WARM
        if pressure is not Pressure.HIGH and self._admitted == self.most:
            wanted = State.NOMINAL
        return Verdict(self._ladder.update(seen.at_s, wanted), max_sequences=self._admitted)
