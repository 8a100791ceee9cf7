"""The governor: from what was observed to how much the engine may do. No clock, no sensor, no engine."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.v1 import telemetry_pb2
from edgellm_agent.governor.control import ShareController
from edgellm_agent.governor.observation import Observation
from edgellm_agent.governor.rules import MemoryRule, Moment, OverCurrentRule, PowerRule, Rule
from edgellm_agent.governor.settings import GovernorSettings
from edgellm_agent.governor.states import State
from edgellm_agent.governor.temperature import TemperatureRule

# Whatever the clock did in between, one record stands for no more time than this.
_LONGEST_STEP_S = 5.0


@dataclass(frozen=True)
class Decision:
    """What holds from now on."""

    state: State = State.NOMINAL
    reasons: tuple[str, ...] = ()
    """Why it is not NOMINAL, the strongest first."""
    pace: float = 1.0
    """Share of the time in which the engine may compute, above 0 to 1."""
    max_sequences: int = 1
    refusing: bool = False
    retry_after_s: float = 0.0
    slope_celsius_per_s: float | None = None

    def to_proto(self, power_budget_mw: float | None = None) -> telemetry_pb2.Governor:
        """The record's part."""
        return telemetry_pb2.Governor(
            state=self.state.name,
            reasons=self.reasons,
            pace=self.pace,
            max_sequences=self.max_sequences,
            refusing=self.refusing,
            slope_celsius_per_s=self.slope_celsius_per_s,
            power_budget_mw=power_budget_mw,
        )


class Governor:
    """Asks its rules, and takes the strictest.

    Args:
        settings: The operator's.
        max_sequences: Requests that may run at once when all is well.
        headroom_bytes: What the memory plan leaves to others on the board.

    """

    def __init__(self, settings: GovernorSettings, max_sequences: int, headroom_bytes: int) -> None:
        self._max_sequences = max_sequences
        self._temperature = TemperatureRule(settings)
        self._rules: list[Rule] = [
            self._temperature,
            OverCurrentRule(settings.min_pace),
            MemoryRule(headroom_bytes, max_sequences),
        ]
        if settings.power_budget_mw is not None:
            controller = ShareController(gain=0.5, reset_s=5.0, band=0.5, floor=settings.min_pace)
            self._rules.append(PowerRule(settings.power_budget_mw, controller))
        self._at_s: float | None = None
        self.decision = Decision(max_sequences=max_sequences)

    def update(self, seen: Observation) -> Decision:
        """The decision from now on; an observation that is not newer than the last one changes nothing."""
        if self._at_s is not None and seen.at_s <= self._at_s:
            return self.decision
        seconds = 0.0 if self._at_s is None else min(seen.at_s - self._at_s, _LONGEST_STEP_S)
        self._at_s = seen.at_s
        moment = Moment(seen, seconds, self.decision.pace)
        verdicts = [(rule.reason, rule.update(moment)) for rule in self._rules]
        state = max(verdict.state for _, verdict in verdicts)
        strongest = sorted(verdicts, key=lambda pair: -pair[1].state)
        admitted = [v.max_sequences for _, v in verdicts if v.max_sequences is not None]
        refusing = state is State.CRITICAL
        self.decision = Decision(
            state=state,
            reasons=tuple(reason for reason, v in strongest if v.state > State.NOMINAL),
            pace=min(verdict.pace for _, verdict in verdicts),
            max_sequences=min(admitted, default=self._max_sequences),
            refusing=refusing,
            retry_after_s=self._temperature.retry_after_s() if refusing else 0.0,
            slope_celsius_per_s=self._temperature.slope,
        )
        return self.decision
