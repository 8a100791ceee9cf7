"""A time that does not go back, for a board whose clock may.

A board without a battery wakes up in 1970 or where it was switched off. What has expired must not count again
for that, so the agent keeps a floor on disk: no time before it is believed. The floor rises with what trusted
keys have signed, and with the wall clock, but by no more than two seconds for each second that the agent
runs. A clock that was years ahead for an hour therefore leaves the floor at most an hour ahead of the true
time, and for no longer than an hour; and one that was off for a month is caught up with in a month.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# 2026-01-01: this was written later, so no clock that says less is right.
WRITTEN_S = 1_767_225_600.0
_RISE = 2.0
_KEEP_EVERY_S = 600.0


class TrustedClock:
    """The later of wall clock and floor.

    Args:
        floor_s: As it was kept; seconds since 1970.
        keep: Writes the floor to disk.
        wall_s: Wall clock, seconds since 1970.
        monotonic_s: A clock that nobody sets.
    """

    def __init__(
        self,
        floor_s: float,
        keep: Callable[[float], None],
        *,
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._floor_s = max(floor_s, WRITTEN_S)
        self._kept_s = floor_s
        self._keep = keep
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._seen_s = monotonic_s()

    def now_s(self) -> float:
        """The time to judge by, seconds since 1970."""
        wall_s, now_s = self._wall_s(), self._monotonic_s()
        risen_s = self._floor_s + _RISE * (now_s - self._seen_s)
        self._seen_s = now_s
        self._floor_s = max(self._floor_s, min(wall_s, risen_s))
        if self._floor_s >= self._kept_s + _KEEP_EVERY_S:
            self.keep()
        return max(wall_s, self._floor_s)

    def witness(self, time_s: float) -> None:
        """A trusted key has signed at that time: it is not earlier now."""
        if time_s > self._floor_s:
            self._floor_s = time_s
            self.keep()

    def keep(self) -> None:
        """Writes the floor."""
        self._keep(self._floor_s)
        self._kept_s = self._floor_s
