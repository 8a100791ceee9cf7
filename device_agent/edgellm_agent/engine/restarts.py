"""When a worker that died is started again, and whether workers die in a loop."""

from __future__ import annotations

from collections import deque

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# A worker that has lived so long starts with the first pause again.
_HEALTHY_S = 60.0


class Restarts:
    """Back-off between starts, and a count of the deaths in a window. Its caller has the clock.

    Args:
        loop_deaths: So many deaths in the window are a loop.
        loop_window_s: Length of the window, seconds.

    """

    def __init__(self, loop_deaths: int, loop_window_s: float) -> None:
        self._loop_deaths = loop_deaths
        self._loop_window_s = loop_window_s
        self._pause_s = _FIRST_PAUSE_S
        self._died_at: deque[float] = deque(maxlen=loop_deaths)

    def died(self, now_s: float, lived_s: float = 0.0) -> bool:
        """A worker died, or did not start; tells whether this completes a loop.

        Deaths that made one loop count for no other: the next is told after as many more.
        """
        if lived_s > _HEALTHY_S:
            self._pause_s = _FIRST_PAUSE_S
        self._died_at.append(now_s)
        if len(self._died_at) < self._loop_deaths or now_s - self._died_at[0] > self._loop_window_s:
            return False
        self._died_at.clear()
        return True

    def next_pause_s(self) -> float:
        """How long to wait before the next start; twice as long each time, up to a bound."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s
