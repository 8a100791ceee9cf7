"""Energy from power: joules since the start, and what each of the last minute's was good for."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from edgellm.v1 import telemetry_pb2

_WINDOW_NS = 60_000_000_000
# A longer silence of the sensor is not guessed at: the total is then a little low, never invented.
_GAP_INTERVALS = 5


class _Point(NamedTuple):
    """What had been used and done when a record was taken."""

    ns: int
    joules: float
    tokens: int
    finished: int


class Energy:
    """The account of one sampler's records, which it must get one after the other.

    The integral is the trapezoid's over the monotonic clock. Power between two records is not seen, so what
    the total is worth depends on how the board's monitor averages.
    """

    def __init__(self, interval_s: float) -> None:
        self._longest_gap_ns = round(_GAP_INTERVALS * interval_s * 1e9)
        self._joules = 0.0
        self._last: tuple[int, float] | None = None
        self._window: deque[_Point] = deque()

    def fill(self, record: telemetry_pb2.Telemetry) -> None:
        """Adds energy and what it was good for; nothing where the module's input was not measured."""
        if not record.power.HasField("total_mw"):
            return
        self._integrate(record.monotonic_ns, record.power.total_mw)
        record.power.energy_total_j = self._joules
        if record.HasField("runtime"):
            self._relate(record.monotonic_ns, record.runtime)

    def _integrate(self, now_ns: int, total_mw: float) -> None:
        if self._last is not None:
            then_ns, then_mw = self._last
            if now_ns - then_ns <= self._longest_gap_ns:
                self._joules += (then_mw + total_mw) / 2 * (now_ns - then_ns) / 1e12
            else:
                # Its work is known and its energy is not: a ratio over it would flatter.
                self._window.clear()
        self._last = now_ns, total_mw

    def _relate(self, now_ns: int, runtime: telemetry_pb2.Runtime) -> None:
        """Tokens and requests over joules between the window's ends."""
        window = self._window
        now = _Point(now_ns, self._joules, runtime.generated_tokens_total, runtime.finished_requests_total)
        if window and (now.tokens < window[-1].tokens or now.finished < window[-1].finished):
            window.clear()  # The counts began anew.
        while len(window) > 1 and window[1].ns <= now_ns - _WINDOW_NS:
            window.popleft()
        window.append(now)
        since = window[0]
        joules = now.joules - since.joules
        if joules <= 0:
            return
        if now.tokens > since.tokens:
            runtime.tokens_per_joule = (now.tokens - since.tokens) / joules
        if now.finished > since.finished:
            runtime.joules_per_request = joules / (now.finished - since.finished)
