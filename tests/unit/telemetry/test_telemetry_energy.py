"""Joules are power over time that was watched; tokens and requests are set against the same minute's."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.energy import Energy

SECOND = 1_000_000_000


def record(seconds: float, watts: float | None = None, tokens: int | None = None, finished: int = 0):
    made = telemetry_pb2.Telemetry(monotonic_ns=round(seconds * SECOND))
    if watts is not None:
        made.power.total_mw = watts * 1000
    if tokens is not None:
        made.runtime.generated_tokens_total = tokens
        made.runtime.finished_requests_total = finished
    return made


def account(records: Iterable[telemetry_pb2.Telemetry], interval_s: float = 1.0):
    energy = Energy(interval_s)
    filled = list(records)
    for made in filled:
        energy.fill(made)
    return filled


def per_joule(made: telemetry_pb2.Telemetry) -> float | None:
    return made.runtime.tokens_per_joule if made.runtime.HasField("tokens_per_joule") else None


def per_request(made: telemetry_pb2.Telemetry) -> float | None:
    return made.runtime.joules_per_request if made.runtime.HasField("joules_per_request") else None


def test_a_ramp_of_power_is_integrated_as_a_trapezoid():
    last = account(record(second, watts=second) for second in range(11))[-1]
    assert last.power.energy_total_j == pytest.approx(50)


@given(
    st.lists(
        st.tuples(st.floats(0.01, 5), st.floats(0, 100)),
        min_size=1,
        max_size=50,
    )
)
def test_the_total_never_falls_and_lies_between_the_bounds_of_power(steps):
    now_s, records = 0.0, [record(0, watts=steps[0][1])]
    for seconds, watts in steps:
        now_s += seconds
        records.append(record(now_s, watts))
    totals = [made.power.energy_total_j for made in account(records)]
    assert totals == sorted(totals)
    powers = [watts for _, watts in steps]
    assert min(powers) * now_s - 1e-6 <= totals[-1] <= max(powers) * now_s + 1e-6


def test_a_longer_silence_is_not_guessed_at():
    bridged, unbridged = 5, 6
    assert account([record(0, 10), record(bridged, 10)])[-1].power.energy_total_j == 50
    silent = account([record(0, 10), record(1, 10), record(1 + unbridged, 10), record(2 + unbridged, 10)])
    assert silent[-1].power.energy_total_j == 20


def test_a_reading_that_is_missing_has_no_total_and_costs_no_energy():
    before, missing, after = account([record(0, 10), record(1), record(2, 10)])
    assert not missing.HasField("power")
    assert after.power.energy_total_j - before.power.energy_total_j == 20


def test_without_a_measured_input_there_is_neither_energy_nor_efficiency():
    made = account(record(second, tokens=second * 10) for second in range(5))[-1]
    assert not made.HasField("power")
    assert per_joule(made) is None


def test_tokens_and_requests_are_set_against_the_joules_of_the_same_minute():
    # 10 W and 20 tokens/s for two minutes, then 5 W and as many tokens.
    records = [record(t, 10, 20 * t, t // 4) for t in range(120)]
    records += [record(t, 5, 20 * t, t // 4) for t in range(120, 200)]
    filled = account(records)
    assert per_joule(filled[119]) == pytest.approx(2)
    assert per_request(filled[119]) == pytest.approx(40)
    # The old minute has left.
    assert per_joule(filled[-1]) == pytest.approx(4)
    assert per_request(filled[-1]) == pytest.approx(20)


def test_when_nothing_was_generated_there_is_no_ratio_and_after_a_minute_there_is_none_again():
    records = [record(t, 10, 0) for t in range(5)]
    records += [record(t, 10, 100, 1) for t in range(5, 70)]
    filled = account(records)
    assert (per_joule(filled[4]), per_request(filled[4])) == (None, None)
    assert per_joule(filled[5]) == pytest.approx(100 / 50)
    assert per_request(filled[63]) is not None
    assert (per_joule(filled[-1]), per_request(filled[-1])) == (None, None)


def test_work_whose_energy_was_not_seen_is_not_counted():
    records = [record(t, 10, 20 * t) for t in range(10)]
    # Half a minute without power; the engine went on.
    records += [record(t, 10, 20 * t) for t in range(40, 50)]
    filled = account(records)
    assert per_joule(filled[10]) is None
    assert all(per_joule(made) == pytest.approx(2) for made in filled[11:])


def test_counts_that_begin_anew_begin_a_new_window():
    records = [record(t, 10, 1000 + 20 * t, 50) for t in range(10)]
    records += [record(10 + t, 10, 40 * t, t) for t in range(10)]
    filled = account(records)
    assert per_joule(filled[10]) is None
    assert per_joule(filled[11]) == pytest.approx(4)
    assert per_request(filled[11]) == pytest.approx(10)


def test_an_interval_of_more_than_a_minute_is_a_window_of_its_own():
    filled = account([record(300 * i, 10, 600 * i) for i in range(3)], interval_s=300)
    assert per_joule(filled[-1]) == pytest.approx(0.2)
