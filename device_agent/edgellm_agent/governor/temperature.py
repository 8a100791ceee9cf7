"""The rule for temperature: holds the board a few degrees below the point where it would throttle itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from edgellm_agent.governor.control import ShareController, SlopeFilter
from edgellm_agent.governor.observation import Observation
from edgellm_agent.governor.rules import Moment, Verdict
from edgellm_agent.governor.settings import GovernorSettings
from edgellm_agent.governor.states import Ladder, State

log = logging.getLogger(__name__)

# Of the controller: chosen on simulated boards, see docs/governor.md.
_GAIN, _RESET_S, _BAND_CELSIUS = 0.08, 40.0, 12.0
# It looks so far ahead; the nearer look decides whether the trip point is about to be crossed.
_HORIZON_S = 2.0
_CROSSING_S = 3.0
_HYSTERESIS_CELSIUS = 2.0
# A missed record or two is nothing. After that the margin is taken to shrink, so fast.
_PATIENCE_S = 3.5
_BLIND_CELSIUS_PER_S = 0.5
# Samples that are further apart say nothing of the slope.
_LONGEST_GAP_S = 5.0
_BACK_OFF = 0.7


@dataclass
class TemperatureRule:
    """Works on the margin: degrees to the trip point of the zone that is nearest to its own."""

    settings: GovernorSettings
    reason: str = "temperature"
    slope: float | None = None
    """Degrees per second, positive when it gets hotter; None while unknown."""
    _controller: ShareController = field(init=False)
    _filter: SlopeFilter = field(default_factory=SlopeFilter)
    _ladder: Ladder = field(default_factory=Ladder)
    _margin: float | None = None
    _seen_at_s: float = 0.0
    _blind: bool = False
    _about_to_cross: int = 0

    def __post_init__(self) -> None:
        """Begins at full pace."""
        self._controller = ShareController(_GAIN, _RESET_S, _BAND_CELSIUS, self.settings.min_pace)

    def update(self, moment: Moment) -> Verdict:
        """CRITICAL at the critical margin, when the trip point is a moment away, or when blind while hot."""
        margin = self._observe(moment.seen)
        if margin is None:
            return Verdict()
        before = self._ladder.state
        state = self._ladder.update(moment.seen.at_s, self._wanted(margin))
        pace = self._pace(margin, moment)
        if state is State.CRITICAL:
            if before is not State.CRITICAL:
                self._controller.back_off(_BACK_OFF)
            pace = self.settings.min_pace
        return Verdict(state, pace)

    def retry_after_s(self) -> float:
        """When a refused client may come again: once the margin has grown back, at today's slope."""
        missing = self.settings.critical_margin_celsius + _HYSTERESIS_CELSIUS - (self._margin or 0.0)
        cooling = -(self.slope or 0.0)
        return min(120.0, max(10.0, missing / cooling)) if cooling > 0.02 else 30.0

    def _observe(self, seen: Observation) -> float | None:
        """The margin, or what is assumed of it while the sensor does not answer; None if it never did."""
        if seen.margin_celsius is None:
            return self._assumed(seen.at_s)
        gap_s = seen.at_s - self._seen_at_s
        if self._margin is None or gap_s > _LONGEST_GAP_S:
            self._filter.clear()
        self.slope = self._filter.update(seen.at_s, -seen.margin_celsius)
        self._margin, self._seen_at_s, self._blind = seen.margin_celsius, seen.at_s, False
        return seen.margin_celsius

    def _assumed(self, now_s: float) -> float | None:
        if self._margin is None:
            return None
        blind_s = now_s - self._seen_at_s
        self._filter.sudden = 0.0
        self._blind = blind_s >= _PATIENCE_S
        if not self._blind:
            return self._margin
        self.slope = None
        self._filter.clear()
        return self._margin - _BLIND_CELSIUS_PER_S * blind_s

    def _wanted(self, margin: float) -> State:
        if self._blind:
            # Lost while cool: it slows down to a crawl, but a broken thermometer refuses nobody.
            lost_hot = (self._margin or 0.0) <= self.settings.hot_margin_celsius
            return State.CRITICAL if lost_hot else min(State.HOT, self._by_margin(margin))
        near = margin - _CROSSING_S * self._filter.sudden <= 0
        self._about_to_cross = self._about_to_cross + 1 if near else 0
        if self._about_to_cross >= 2:
            return State.CRITICAL
        return self._by_margin(margin)

    def _by_margin(self, margin: float) -> State:
        settings = self.settings
        for state, least in (
            (State.CRITICAL, settings.critical_margin_celsius),
            (State.HOT, settings.hot_margin_celsius),
            (State.WARM, settings.warm_margin_celsius),
        ):
            if margin <= least + (_HYSTERESIS_CELSIUS if self._ladder.state >= state else 0.0):
                return state
        return State.NOMINAL

    def _pace(self, margin: float, moment: Moment) -> float:
        rise = max(self.slope or 0.0, self._filter.sudden)
        room = margin - _HORIZON_S * rise - self.settings.target_margin_celsius
        may_rise = moment.proves_room(self._controller.output)
        return self._controller.update(room, moment.seconds, may_rise=may_rise)
