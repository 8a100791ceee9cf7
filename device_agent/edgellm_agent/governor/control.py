"""The control loop's parts: a PI controller for a share, and a slope out of noisy samples."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from itertools import combinations

# Back-calculation takes so long: a burst that begins on a cooled die does not undo what was learned.
_TRACKING_S = 10.0
# Down at once, up with care: a die that follows within a second would otherwise swing with the controller.
_RISE_PER_S = 0.1
_WINDOW_S = 6.0
_WINDOW_SAMPLES = 12
# Two samples of a sensor with an error of ±0.5 may differ by so much while nothing changes.
_NOISE = 1.0


@dataclass
class ShareController:
    """A PI controller whose output is a share between a floor and 1.

    With an error of `band` or more it gives 1. Where a busy device needs no more than 1, the integral part is
    set back to what that takes (back-calculation): so the output leaves its limit as soon as the room shrinks
    quickly, and not only when there is none left.

    Args:
        gain: Share per unit of error.
        reset_s: Time in which the integral part repeats the proportional one.
        band: Error, in its unit.
        floor: Least output.

    """

    gain: float
    reset_s: float
    band: float
    floor: float
    output: float = 1.0
    _learned: float = field(init=False)

    def __post_init__(self) -> None:
        """Begins at 1."""
        self._learned = 1.0 - self.gain * self.band

    def update(self, error: float, seconds: float, *, may_rise: bool) -> float:
        """The output, given an error (positive: there is room) that lasted so long.

        Without `may_rise` it only falls, outside of the band: what an idle device shows is no proof of room.
        """
        proportional = self.gain * error
        if error < 0 or may_rise:
            self._learned += proportional / self.reset_s * seconds
        if may_rise:
            excess = max(0.0, self._learned - (1.0 - proportional))
            self._learned -= excess * min(1.0, seconds / _TRACKING_S)
        if error >= self.band:
            self._learned = max(self._learned, 1.0 - self.gain * self.band)
        self._learned = min(1.0, max(0.0, self._learned))
        rise = _RISE_PER_S * seconds if may_rise or error >= self.band else 0.0
        wanted = max(self.floor, proportional + self._learned)
        self.output = min(1.0, wanted, self.output + rise)
        return self.output

    def back_off(self, factor: float) -> None:
        """Takes a part of what was learned away: it was too much."""
        self._learned *= factor


class SlopeFilter:
    """How fast a figure rises, units per second, from samples that are noisy, late or missing."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=_WINDOW_SAMPLES)
        self.sudden = 0.0
        """Rise since the last sample that its noise cannot explain; at least 0."""

    def update(self, at_s: float, value: float) -> float | None:
        """The median slope of all pairs in the window (Theil and Sen): one wild sample does not move it.

        None until there are three samples.
        """
        samples = self._samples
        self.sudden = 0.0
        if samples:
            before_s, before = samples[-1]
            self.sudden = max(0.0, (value - before - _NOISE) / (at_s - before_s))
        samples.append((at_s, value))
        while at_s - samples[0][0] > _WINDOW_S:
            samples.popleft()
        if len(samples) < 3:
            return None
        return statistics.median((y - x) / (t - s) for (s, x), (t, y) in combinations(samples, 2))

    def clear(self) -> None:
        """Forgets all samples."""
        self._samples.clear()
        self.sudden = 0.0
