"""What clients waited, and how it is counted: in bounded memory, within a stated error."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.v1 import telemetry_pb2, worker_pb2
from edgellm_agent.engine.figures import AnswerWatch, EngineFigures, Health, Histogram, Totals

# Within the range for which the error is stated.
DURATIONS = st.floats(2.0**-14, 2.0**10, exclude_max=True)


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def nearest_rank(values: list[float], percent: int) -> float:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


@given(st.lists(DURATIONS, min_size=1, max_size=300))
def test_percentiles_are_within_a_32nd_of_the_exact_ones(durations):
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    recent = histogram.recent(0)
    assert recent.count == len(durations)
    for percent, got in ((50, recent.p50_s), (95, recent.p95_s), (99, recent.p99_s)):
        assert got == pytest.approx(nearest_rank(durations, percent), rel=1 / 32)


@given(st.lists(DURATIONS, max_size=100))
def test_the_cumulative_buckets_count_what_was_shorter(durations):
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    buckets = list(histogram.cumulative())
    assert [count for _, count in buckets] == [sum(s < bound for s in durations) for bound, _ in buckets]
    assert histogram.count == len(durations)
    assert histogram.sum_s == pytest.approx(sum(durations))


@pytest.mark.parametrize(("seconds", "nearest_s"), [(0.0, 2.0**-14), (1e-9, 2.0**-14), (5000.0, 2.0**10)])
def test_what_lies_outside_counts_as_the_nearest_bucket(seconds, nearest_s):
    histogram = Histogram()
    histogram.observe(seconds)
    assert histogram.recent(0).p50_s == pytest.approx(nearest_s, rel=1 / 16)


def test_a_duration_counts_as_often_as_it_is_told():
    histogram = Histogram()
    histogram.observe(1.0, 99)
    histogram.observe(10.0)
    recent = histogram.recent(0)
    assert (recent.count, histogram.sum_s) == (100, 109)
    assert recent.p99_s == pytest.approx(1, rel=1 / 32)


def test_without_any_there_are_no_percentiles():
    assert Histogram().recent(0) is None


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60))
def test_the_window_has_all_of_the_last_minute(arrivals):
    histogram = Histogram()
    for now_s in range(201):
        for _ in range(arrivals.count(now_s)):
            histogram.observe(0.001)
        recent = histogram.recent(now_s)
        counted = 0 if recent is None else recent.count
        assert counted >= sum(now_s - 60 < arrival <= now_s for arrival in arrivals)
        assert counted <= sum(now_s - 65 <= arrival <= now_s for arrival in arrivals)
    assert histogram.count == len(arrivals)


def test_the_window_never_reaches_back_further_than_65_s():
    histogram, counts = Histogram(), []
    for now_s in range(300):
        histogram.observe(0.001)
        counts.append(histogram.recent(now_s).count)
    assert (min(counts[70:]), max(counts)) == (60, 64)


@pytest.mark.parametrize(("before_s", "since_s"), [(5.0, 0.01), (0.01, 5.0)])
def test_old_durations_leave_the_percentiles_but_not_the_total(before_s, since_s):
    histogram = Histogram()
    for now_s in range(140):
        histogram.observe(before_s if now_s < 70 else since_s)
        recent = histogram.recent(now_s)
    assert (recent.p50_s, recent.p99_s) == pytest.approx((since_s, since_s), rel=1 / 32)
    assert dict(histogram.cumulative())[4.0] == 70


def test_marks_are_bounded_however_often_one_asks():
    histogram = Histogram()
    for step in range(5000):
        histogram.observe(0.01)
        histogram.recent(step / 10)
    assert len(histogram._marks) <= 14


def watch(time: Time, credit_tokens: int = 64) -> tuple[AnswerWatch, Totals]:
    totals = Totals(clock=time)
    return AnswerWatch(EngineFigures(totals), credit_tokens), totals


def figures(totals: Totals) -> telemetry_pb2.Runtime:
    record = telemetry_pb2.Runtime()
    totals.fill(record)
    return record


def test_the_first_token_is_timed_from_the_request_and_the_others_from_the_one_before():
    time = Time()
    answer, totals = watch(time)
    for now_s in (2.0, 2.1, 2.2):
        time.now_s = now_s
        answer.came(1)
    record = figures(totals)
    assert (record.time_to_first_token.count, record.inter_token_latency.count) == (1, 2)
    assert record.time_to_first_token.p50_s == pytest.approx(2, rel=1 / 32)
    assert record.inter_token_latency.p99_s == pytest.approx(0.1, rel=1 / 32)


def test_tokens_that_come_together_share_their_gap():
    time = Time()
    answer, totals = watch(time)
    answer.came(3)
    time.now_s = 0.4
    answer.came(4)
    assert (totals.first_token.count, totals.inter_token.count) == (1, 4)
    assert totals.inter_token.sum_s == pytest.approx(0.4)
    assert figures(totals).inter_token_latency.p50_s == pytest.approx(0.1, rel=1 / 32)


def test_text_without_a_token_is_no_token():
    time = Time()
    answer, totals = watch(time)
    time.now_s = 1
    answer.came(0)
    assert totals.first_token.count == 0
    answer.came(1)
    time.now_s = 2
    answer.came(0)
    time.now_s = 3
    answer.came(1)
    assert totals.inter_token.sum_s == pytest.approx(2)


def test_a_gap_for_which_the_reader_is_to_blame_does_not_count():
    time = Time()
    answer, totals = watch(time, credit_tokens=2)
    answer.came(1)
    time.now_s = 1
    answer.came(1)  # No more may come until the reader takes some.
    time.now_s = 100
    answer.taken(2)
    answer.came(1)
    time.now_s = 101
    answer.came(1)
    assert (totals.inter_token.count, totals.inter_token.sum_s) == (2, 2)


def test_latencies_that_were_never_measured_are_absent_and_counts_are_not():
    record = figures(Totals(requests=3, restarts=2))
    assert not record.HasField("time_to_first_token")
    assert not record.HasField("inter_token_latency")
    assert (record.requests_total, record.worker_restarts_total) == (3, 2)


def test_what_a_worker_did_between_two_polls_is_added():
    totals = Totals(generated_tokens=10)
    totals.add(
        worker_pb2.Stats(generated_tokens_total=5, preemptions_total=1),
        worker_pb2.Stats(generated_tokens_total=8, preemptions_total=1, draft_tokens_total=4),
    )
    record = figures(totals)
    assert (record.generated_tokens_total, record.preemptions_total, record.draft_tokens_total) == (13, 0, 4)


def test_an_engines_health_is_its_own_and_the_agents_totals_are_of_all_engines():
    totals = Totals()
    one, other = EngineFigures(totals), EngineFigures(totals)
    one.finished()
    one.died(hung=True)
    one.died()
    other.failed(by_engine=True)
    assert one.health == Health(deaths=2, hangs=1, finished=1, failed=0)
    assert other.health == Health(failed=1)
    assert (totals.finished_requests, totals.failed_requests) == (1, 1)


def test_a_refusal_has_failed_its_client_but_speaks_for_the_engine():
    figures = EngineFigures()
    AnswerWatch(figures, 64).failed(by_engine=False)
    assert figures.health == Health()
    assert figures.totals.failed_requests == 1
