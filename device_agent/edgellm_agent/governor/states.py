"""The governor's states, and how one is kept from flapping."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    """How near the board is to what it must not reach; the names are those of `Governor.state`."""

    NOMINAL = 0
    WARM = 1
    HOT = 2
    CRITICAL = 3


# A critical device refuses requests: it shall not do so for longer than it must.
_HOLD_S = {State.WARM: 120.0, State.HOT: 120.0, State.CRITICAL: 10.0}


class Ladder:
    """A state that rises at once, and falls step by step after it was not needed for a while.

    So it changes at most twice per hold, whatever the board does.
    """

    def __init__(self) -> None:
        self.state = State.NOMINAL
        self._needed_at_s = 0.0

    def update(self, now_s: float, wanted: State) -> State:
        """The state from now on, where the figures alone would give `wanted`."""
        if wanted >= self.state:
            self.state, self._needed_at_s = wanted, now_s
        elif now_s - self._needed_at_s >= _HOLD_S[self.state]:
            self.state, self._needed_at_s = State(self.state - 1), now_s
        return self.state
