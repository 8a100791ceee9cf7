"""How much of the time the worker computes: after each turn it rests as long as the asked share demands."""

from __future__ import annotations

from collections.abc import Callable

# A turn that took very long (the process was stopped, the machine slept) shall not stop the streams for good.
_LONGEST_REST_S = 20.0


class Pace:
    """Turns a share of time into rests. At a share of 1 it does nothing and asks no clock.

    Time in which there was nothing to compute counts as rest.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._share = 1.0
        self._began = self._took_s = self._ended = 0.0

    def set_share(self, share: float) -> None:
        """What holds from now on, above 0 to 1; a rest that is under way gets shorter or longer with it.

        Anything else is 1: an agent that says nothing of pace wants none.
        """
        self._share = share if 0.0 < share < 1.0 else 1.0

    def begin(self) -> None:
        """A turn begins to compute."""
        if self._share < 1.0:
            self._began = self._clock()

    def end(self) -> None:
        """The turn has computed."""
        if self._share < 1.0:
            self._ended = self._clock()
            self._took_s = self._ended - self._began

    def rest_s(self) -> float:
        """How long to rest from now on; 0 if the next turn may compute."""
        if self._share == 1.0:
            return 0.0
        rest_s = min(_LONGEST_REST_S, self._took_s * (1.0 / self._share - 1.0))
        return max(0.0, self._ended + rest_s - self._clock())
