"""Tells when a worker hangs: it was asked, and nothing came from it for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_LONGEST_TICK_S = 1.0
_TICKS = 20


class Watchdog:
    """Counts the time in which a worker owed an answer and was silent.

    Anything that comes ends the silence: a long answer to many requests is no hang. Time is counted in
    ticks, and one that came late counts nothing, because then it was the agent that did not run: blocked,
    stopped together with its worker, or starved. So no worker is judged before the agent has run for at
    least one whole tick, in which it has read what was waiting. The clock is the event loop's
    (CLOCK_MONOTONIC): setting the date does not move it, and while the machine is suspended it stands still.

    Args:
        hang_s: How long a worker may be silent.
        clock: Monotonic seconds.

    """

    def __init__(self, hang_s: float, clock: Callable[[], float]) -> None:
        self.hang_s = hang_s
        self._clock = clock
        self._tick_s = min(_LONGEST_TICK_S, hang_s / _TICKS)
        self._owes = False
        self._silent_s = 0.0
        self._ticked_at = clock()

    def asked(self) -> None:
        """The worker owes an answer."""
        self._owes = True

    def heard(self) -> None:
        """Something came from it."""
        self._owes, self._silent_s = False, 0.0

    async def until_hung(self) -> None:
        """Returns once the worker has been silent for too long."""
        self._ticked_at = self._clock()
        while self._silent_s < self.hang_s:
            await asyncio.sleep(self._tick_s)
            self._tick()

    def _tick(self) -> None:
        now = self._clock()
        elapsed_s, self._ticked_at = now - self._ticked_at, now
        if self._owes and elapsed_s < 2 * self._tick_s:
            self._silent_s += elapsed_s
