"""Figures follow from arrival times alone, by rules that hold for all of them."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench.load import Arrival, Record
from edgellm.bench.metrics import (
    Distribution,
    PowerSample,
    energy_j,
    gaps_s,
    nearest_rank,
    summarize,
    tpot_s,
    ttft_s,
)
from edgellm.bench.target import Usage
from edgellm.errors import RemoteError

numbers = st.floats(min_value=0, max_value=1e6)
short = st.floats(min_value=0.001, max_value=10)


@st.composite
def records(draw: st.DrawFn) -> Record:
    began = draw(st.floats(min_value=0, max_value=100))
    at, arrivals = began, []
    for wait, tokens in draw(st.lists(st.tuples(short, st.integers(1, 4)), min_size=1, max_size=8)):
        at += wait
        arrivals.append(Arrival(at, tokens))
    return Record(began, at + draw(short), tuple(arrivals))


@given(st.lists(numbers, min_size=1, max_size=50), st.integers(1, 100))
def test_a_percentile_is_the_smallest_measured_value_that_so_many_do_not_exceed(values, percent):
    found = nearest_rank(sorted(values), percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


@given(st.lists(numbers, min_size=1, max_size=50))
def test_percentiles_rise_from_minimum_to_maximum(values):
    found = Distribution.of(values)
    ranks = [found.minimum, found.p50, found.p90, found.p95, found.p99, found.maximum]
    assert ranks == sorted(ranks)
    assert (found.minimum, found.maximum, found.count) == (min(values), max(values), len(values))
    assert found.average == pytest.approx(sum(values) / len(values))


def test_of_a_hundred_values_the_percentiles_are_themselves():
    found = Distribution.of(range(1, 101))
    assert (found.p50, found.p90, found.p95, found.p99) == (50, 90, 95, 99)


def test_no_values_have_no_distribution():
    assert Distribution.of([]) is None


@given(records())
def test_latency_is_first_token_and_the_rest_of_the_tokens_and_the_close(record):
    tokens = record.output_tokens
    last_s = record.arrivals[-1].at_s
    assert ttft_s(record) + (tpot_s(record) or 0) * (tokens - 1) == pytest.approx(last_s - record.began_s)


@given(records())
def test_gaps_are_one_fewer_than_tokens_and_the_time_per_token_is_their_mean(record):
    gaps = gaps_s(record)
    assert len(gaps) == record.output_tokens - 1
    if gaps:
        assert sum(gaps) / len(gaps) == pytest.approx(tpot_s(record), abs=1e-9)


def test_tokens_that_arrive_together_are_not_apart_and_a_stall_shows():
    record = Record(0, 9, (Arrival(1, 1), Arrival(4, 3)))
    assert gaps_s(record) == [3, 0, 0]
    assert tpot_s(record) == 1


def test_an_answer_of_one_token_has_a_first_token_and_no_time_per_token():
    metrics = summarize([Record(0, 3, (Arrival(2, 1),))])
    assert metrics.time_to_first_token_ms.p50 == 2000
    assert metrics.time_per_output_token_ms is metrics.output_token_throughput_per_user_tok_s is None


@given(st.lists(records(), min_size=1, max_size=8))
def test_throughput_is_what_was_finished_over_the_span(found):
    metrics = summarize(found)
    span_s = max(record.ended_s for record in found) - min(record.began_s for record in found)
    tokens = sum(record.output_tokens for record in found)
    assert metrics.system_output_throughput_tok_s * span_s == pytest.approx(tokens)
    assert metrics.request_throughput_req_s * span_s == pytest.approx(len(found))


@given(records())
def test_the_speed_of_a_user_is_the_inverse_of_the_time_per_token(record):
    metrics = summarize([record])
    if tpot_s(record):
        per_user = metrics.output_token_throughput_per_user_tok_s.average
        assert per_user * metrics.time_per_output_token_ms.average == pytest.approx(1000)


def test_failures_are_counted_by_code_and_their_tokens_do_not_count():
    good = Record(0, 2, (Arrival(1, 4),))
    bad = [
        Record(0, 4, (Arrival(1, 9),), error=RemoteError("x", code=code))
        for code in ("UNAVAILABLE", "UNAVAILABLE", "INTERNAL")
    ]
    metrics = summarize([good, *bad], unfinished=2)
    assert metrics.errors == {"UNAVAILABLE": 2, "INTERNAL": 1}
    assert (metrics.requests, metrics.unfinished) == (1, 2)
    assert metrics.system_output_throughput_tok_s == 1
    assert metrics.request_latency_ms.count == 1


def test_the_target_s_own_count_of_tokens_goes_before_that_of_the_arrivals():
    counted = Record(0, 2, (Arrival(1, 1), Arrival(2, 1)), usage=Usage(output_tokens=5))
    assert summarize([counted]).avg_output_tokens == 5
    assert tpot_s(counted) == 0.25


def test_nothing_measured_is_none_and_not_zero():
    metrics = summarize([])
    assert metrics.avg_input_tokens is metrics.request_latency_ms is metrics.energy_j is None
    assert metrics.to_dict()["avg_ttft_ms"] is None


def test_averages_bear_the_names_of_trtllm_bench():
    named = summarize([Record(0, 3, (Arrival(1, 1), Arrival(2, 2)))]).to_dict()
    assert (named["avg_ttft_ms"], named["avg_tpot_ms"], named["avg_request_latency_ms"]) == (1000, 500, 3000)


def power(*readings):
    return [PowerSample(at, mw) for at, mw in readings]


@given(st.floats(0, 100), st.floats(0.1, 60), st.floats(100, 60_000))
def test_constant_power_gives_power_times_time(start, length, mw):
    readings = power(*((start + second, mw) for second in range(int(length) + 1)))
    assert energy_j(readings, start, start + length) == pytest.approx(mw / 1000 * length)


@given(st.lists(st.floats(100, 60_000), min_size=12, max_size=12), st.floats(1, 10))
def test_the_energy_of_two_parts_is_that_of_the_whole(levels, middle):
    readings = power(*enumerate(levels))
    parts = energy_j(readings, 0.5, middle) if middle > 0.5 else 0
    assert parts + energy_j(readings, middle, 11) == pytest.approx(energy_j(readings, 0.5, 11))


def test_a_reading_holds_until_the_next():
    assert energy_j(power((0, 1000), (2, 3000)), 0, 4) == 1 * 2 + 3 * 2
    assert energy_j(power((0, 1000), (2, 3000), (9, 9000)), 1, 3) == 1 * 1 + 3 * 1


@pytest.mark.parametrize(
    "readings", [(), ((0, 5000),), ((6, 5000), (8, 5000)), ((0, 5000), (7, 5000)), ((20, 5000),)]
)
def test_without_readings_all_the_time_the_energy_is_unknown(readings):
    assert energy_j(power(*readings), 0, 10) is None


def test_tokens_per_joule_are_the_finished_ones_over_the_energy():
    found = [Record(0, 4, (Arrival(1, 30), Arrival(4, 30)))]
    metrics = summarize(found, power=power(*((second, 5000) for second in range(5))))
    assert (metrics.energy_j, metrics.output_tokens_per_joule) == (20, 3)


def test_percentile_names_are_those_of_the_field():
    names = [field.name for field in fields(Distribution)]
    assert names == ["count", "minimum", "p50", "p90", "p95", "p99", "maximum", "average"]
