"""What the engines did since the agent's start, and how long their clients waited for tokens."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil, frexp
from operator import sub
from typing import NamedTuple

from edgellm.v1 import telemetry_pb2, worker_pb2

# Each octave of seconds has so many buckets of one width, so a bucket's middle is within 1/32 of all in it.
_STEPS = 16
# Octaves: 2^-14 s (61 µs, less than any token takes) to 2^10 s (17 minutes, more than a request may take).
_FIRST, _LAST = -14, 10
_SHORTEST_S, _LONGEST_S = 2.0**_FIRST, 2.0**_LAST
_BUCKETS = (_LAST - _FIRST) * _STEPS
_WINDOW_S = 60.0
_MARK_S = 5.0
# Bounds that Prometheus gets: each octave from 1 ms to 64 s.
_BOUNDS = range(-10, 7)


class _Mark(NamedTuple):
    """What a histogram had counted at a time."""

    at_s: float
    observed: int
    buckets: array[int]


class Histogram:
    """Durations since the start, in buckets that widen with the duration, and those of the last minute.

    A percentile is within 1/32 (3.2 %) of the exact one (nearest rank) from 61 µs to 17 minutes; what lies
    outside counts as the nearest bucket. Memory is bounded: 15 arrays of 384 counts.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sum_s = 0.0
        self._buckets = array("Q", bytes(8 * _BUCKETS))
        self._marks = deque([_Mark(float("-inf"), 0, self._buckets[:])])

    def observe(self, seconds: float, times: int = 1) -> None:
        """Counts a duration, so many times."""
        if seconds < _SHORTEST_S:
            bucket = 0
        elif seconds >= _LONGEST_S:
            bucket = _BUCKETS - 1
        else:
            # mantissa in [1/2, 1): exact, so that an octave's bound is a bucket's.
            mantissa, exponent = frexp(seconds)
            bucket = (exponent - _FIRST - 2) * _STEPS + int(mantissa * (2 * _STEPS))
        self._buckets[bucket] += times
        self.count += times
        self.sum_s += seconds * times

    def recent(self, now_s: float) -> telemetry_pb2.Percentiles | None:
        """Gives the percentiles of the last 60 to 65 s; None while there was nothing.

        It must be asked every few seconds: the window is as much longer as it was not asked.
        """
        base = self._base(now_s)
        count = self.count - base.observed
        if count == 0:
            return None
        ranks = list(accumulate(map(sub, self._buckets, base.buckets)))
        p50_s, p95_s, p99_s = (
            _middle_s(bisect_left(ranks, ceil(count * hundredths / 100))) for hundredths in (50, 95, 99)
        )
        return telemetry_pb2.Percentiles(p50_s=p50_s, p95_s=p95_s, p99_s=p99_s, count=count)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Gives (bound in seconds, how many were shorter) since the start."""
        ranks = list(accumulate(self._buckets))
        for octave in _BOUNDS:
            yield 2.0**octave, ranks[(octave - _FIRST) * _STEPS - 1]

    def _base(self, now_s: float) -> _Mark:
        """The latest mark that is a minute old, or else the first; sets a new one when it is time."""
        marks = self._marks
        while len(marks) > 1 and marks[1].at_s <= now_s - _WINDOW_S:
            marks.popleft()
        last = marks[-1]
        if now_s - last.at_s >= _MARK_S:
            same = last.observed == self.count
            marks.append(_Mark(now_s, self.count, last.buckets if same else self._buckets[:]))
        return marks[0]


def _middle_s(bucket: int) -> float:
    octave, step = divmod(bucket, _STEPS)
    return 2.0 ** (_FIRST + octave) * (1 + (step + 0.5) / _STEPS)


@dataclass
class Totals:
    """Counts over all engines of this agent and all their workers: an engine that goes takes none along."""

    requests: int = 0
    finished_requests: int = 0
    failed_requests: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    restarts: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)
    clock: Callable[[], float] = time.monotonic

    def add(self, before: worker_pb2.Stats, now: worker_pb2.Stats) -> None:
        """Counts what a worker did between two polls."""
        for name in (
            "generated_tokens",
            "cached_tokens",
            "preemptions",
            "draft_tokens",
            "accepted_draft_tokens",
        ):
            more = getattr(now, f"{name}_total") - getattr(before, f"{name}_total")
            setattr(self, name, getattr(self, name) + more)

    def fill(self, record: telemetry_pb2.Runtime) -> None:
        """Adds the counts and the percentiles of the last minute to a record."""
        record.requests_total = self.requests
        record.finished_requests_total = self.finished_requests
        record.failed_requests_total = self.failed_requests
        record.generated_tokens_total = self.generated_tokens
        record.cached_tokens_total = self.cached_tokens
        record.preemptions_total = self.preemptions
        record.draft_tokens_total = self.draft_tokens
        record.accepted_draft_tokens_total = self.accepted_draft_tokens
        record.worker_restarts_total = self.restarts
        now_s = self.clock()
        if (first_token := self.first_token.recent(now_s)) is not None:
            record.time_to_first_token.CopyFrom(first_token)
        if (inter_token := self.inter_token.recent(now_s)) is not None:
            record.inter_token_latency.CopyFrom(inter_token)


@dataclass(frozen=True)
class Health:
    """How one engine has fared since it was started."""

    deaths: int = 0
    """Workers that ended without being asked to, and starts that failed."""
    hangs: int = 0
    """Of the deaths, those of workers that were killed because they kept silent."""
    finished: int = 0
    """Requests with a whole answer."""
    failed: int = 0
    """Requests that the engine could not answer. What it refuses (wrong, too long, busy, draining), a
    deadline that passed and a client that left are not its fault."""


@dataclass
class EngineFigures:
    """Counts of one engine and all its workers, which count in the agent's totals as well."""

    totals: Totals = field(default_factory=Totals)
    health: Health = field(default_factory=Health, init=False)

    def finished(self) -> None:
        """A request has its whole answer."""
        self.totals.finished_requests += 1
        self.health = replace(self.health, finished=self.health.finished + 1)

    def failed(self, *, by_engine: bool) -> None:
        """A request has no answer, or only a part of one, and not because its client left."""
        self.totals.failed_requests += 1
        self.health = replace(self.health, failed=self.health.failed + by_engine)

    def died(self, *, hung: bool = False) -> None:
        """A worker ended without being asked to, or did not start."""
        self.health = replace(self.health, deaths=self.health.deaths + 1, hangs=self.health.hangs + hung)


class AnswerWatch:
    """Times one answer as its client on the device sees it, from the request on, and counts how it ended.

    Args:
        figures: Where it is counted.
        credit_tokens: Tokens that may come before the reader has taken any.

    """

    def __init__(self, figures: EngineFigures, credit_tokens: int) -> None:
        totals = figures.totals
        self._figures = figures
        self._totals = totals
        self._credit = credit_tokens
        self._last_s = totals.clock()
        self._begun = False
        self._held = False

    def came(self, tokens: int) -> None:
        """So many tokens came at once.

        The first of an answer gives the time to the first token. n later ones that come together (guessed
        tokens) count as n gaps of the n-th part, which keeps the mean. A gap for which the reader was to
        blame, because it had taken nothing for so long that no more could be sent, does not count.
        """
        if tokens == 0:
            return
        now_s = self._totals.clock()
        gap_s = now_s - self._last_s
        if not self._begun:
            self._totals.first_token.observe(gap_s)
        elif not self._held:
            self._totals.inter_token.observe(gap_s / tokens, tokens)
        self._begun, self._last_s = True, now_s
        self._credit -= tokens
        self._held = self._credit <= 0

    def taken(self, tokens: int) -> None:
        """The reader took so many, and as many more may come."""
        self._credit += tokens

    def finished(self) -> None:
        """The answer is complete."""
        self._figures.finished()

    def failed(self, *, by_engine: bool) -> None:
        """There is no answer, or only a part of it, and not because its client left."""
        self._figures.failed(by_engine=by_engine)
