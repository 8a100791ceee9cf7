"""Fair timing on a machine that others use too: rivals take turns, and disturbed turns are taken again."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# Threads of one side still spin for a moment when its turn is over.
_REST_S = 0.05
# More than this share of one core, used by others or stolen by the hypervisor, disturbs a turn.
_DISTURBED_CORES = 0.08
_PATIENCE_S = 90.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Samples:
    """The figures of each rival, round by round; `disturbed` of them could not be taken in peace."""

    by_name: Mapping[str, list[float]]
    disturbed: int

    def median(self, name: str) -> float:
        """Of one rival's figures."""
        return statistics.median(self.by_name[name])

    def ratio(self, ours: str, peer: str) -> float:
        """Median of the rounds' ratios: what slows a round slows both."""
        return statistics.median(a / b for a, b in zip(self.by_name[ours], self.by_name[peer], strict=True))

    def __str__(self) -> str:
        """How they were taken, for the table."""
        rounds = len(next(iter(self.by_name.values())))
        disturbed = f", {self.disturbed} of them disturbed by others" if self.disturbed else ""
        return f"median of {rounds} turns{disturbed}"


class Others:
    """How much of the machine goes to others than this process and its children."""

    def __init__(self) -> None:
        """Begins to watch."""
        self._at, self._busy, self._own = self._read()

    def cores(self) -> float:
        """Cores that they used, or that the hypervisor took, since the watch began."""
        at, busy, own = self._read()
        return max(0.0, (busy - self._busy) - (own - self._own)) / (at - self._at)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        ticks = [int(t) for t in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks[:8]
        own = sum(os.times()[:4])
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                own += sum(child.cpu_times()[:4])
        return time.monotonic(), (user + nice + system + irq + softirq + steal) / _TICKS_PER_S, own


def take_turns(
    rivals: Mapping[str, Callable[[], float]], rounds: int, tolerated_cores: float = _DISTURBED_CORES
) -> Samples:
    """Each rival once a round; a first round, for warm caches and kept buffers, does not count.

    A round that others disturb is taken again, until patience ends.
    """
    figures: dict[str, list[float]] = {name: [] for name in rivals}
    disturbed = 0
    _round(rivals)
    until = time.monotonic() + _PATIENCE_S
    while len(next(iter(figures.values()))) < rounds:
        patient = time.monotonic() < until
        others = Others()
        measured = _round(rivals)
        if others.cores() > tolerated_cores:
            if patient:
                time.sleep(1.0)
                continue
            disturbed += 1
        for name, figure in measured.items():
            figures[name].append(figure)
    return Samples(figures, disturbed)


def _round(rivals: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    measured = {}
    for name, measure in rivals.items():
        measured[name] = measure()
        time.sleep(_REST_S)
    return measured
