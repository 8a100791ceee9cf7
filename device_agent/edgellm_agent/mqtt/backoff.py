"""How long to wait before the next dial, so that a thousand boards do not dial at once."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Random waits below a bound that doubles ("full jitter"), from a second to a minute.

    A broker that comes back is found within the last bound, by a fleet that is spread evenly over it.
    """

    def __init__(
        self,
        *,
        least_s: float = 0.25,
        most_s: float = 60.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._uniform = uniform
        self._bound_s = 1.0

    def next_s(self) -> float:
        """How long to wait now."""
        wait_s = self._uniform(self._least_s, self._bound_s)
        self._bound_s = min(self._most_s, self._bound_s * 2)
        return wait_s

    def reset(self) -> None:
        """The last dial was good."""
        self._bound_s = 1.0
