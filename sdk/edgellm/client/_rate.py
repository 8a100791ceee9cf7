"""How fast bytes go out: a bound that many transfers share, and what they come to."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

# What may go out at once after a silence, as time at the full rate.
_BURST_S = 0.25
# The rate that is shown is that of so long.
_WINDOW_S = 10.0
_SHORTEST_S = 0.5


class RateLimit:
    """A token bucket: at most so many bytes per second, over all transfers that share it.

    For threads and event loops alike: it says how long to wait, and waits for nothing itself.

    Args:
        bytes_per_s: Most on the average; after a silence a quarter of a second's bytes may go out at once.
        clock: Seconds that only rise.
    """

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"bytes_per_s: not above 0: {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at_s = clock()

    def take(self, count: int) -> float:
        """Takes so many bytes; returns how long to wait before they are sent, s."""
        with self._lock:
            now_s = self._clock()
            self._free_at_s = max(self._free_at_s, now_s - _BURST_S) + count / self.bytes_per_s
            return max(0.0, self._free_at_s - now_s)


class Meter:
    """The rate of the last ten seconds.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: deque[tuple[float, int]] = deque()
        self._sum_bytes = 0
        self._began_s = clock()

    def count(self, sent_bytes: int) -> None:
        """Takes note of bytes that went out now."""
        self._sent.append((self._clock(), sent_bytes))
        self._sum_bytes += sent_bytes

    def bytes_per_s(self) -> float:
        """Mean over the window; 0 before there is anything to tell."""
        now_s = self._clock()
        while self._sent and self._sent[0][0] < now_s - _WINDOW_S:
            self._sum_bytes -= self._sent.popleft()[1]
        span_s = min(_WINDOW_S, now_s - self._began_s)
        return self._sum_bytes / span_s if span_s >= _SHORTEST_S else 0.0
