"""What the governor decides, one rule at a time."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edgellm.v1 import telemetry_pb2
from edgellm_agent.governor.observation import Observation, observe
from edgellm_agent.governor.policy import Governor
from edgellm_agent.governor.settings import GovernorSettings
from edgellm_agent.governor.states import State

MIB = 1 << 20
HEADROOM = 512 * MIB
PLENTY = 4 * HEADROOM


class Board:
    """Shows the governor one observation a second."""

    def __init__(self, **options):
        self.governor = Governor(GovernorSettings(**options), max_sequences=8, headroom_bytes=HEADROOM)
        self.now = 1000.0
        self.decisions = []

    def show(self, seconds=1, every_s=1.0, **seen):
        for _ in range(seconds):
            self.now += every_s
            self.decisions.append(self.governor.update(Observation(self.now, **seen)))
        return self.decisions[-1]

    def ramp(self, start, end, seconds):
        """The margin goes from one figure to the other."""
        for i in range(1, seconds + 1):
            decision = self.show(margin_celsius=start + (end - start) * i / seconds)
        return decision


@pytest.fixture
def board():
    return Board()


def test_a_cool_board_is_left_alone(board):
    decision = board.show(20, margin_celsius=45.0, power_mw=12_000, available_bytes=PLENTY)
    assert (decision.state, decision.reasons, decision.pace) == (State.NOMINAL, (), 1.0)
    assert (decision.max_sequences, decision.refusing) == (8, False)


def test_the_state_follows_the_margin_up_at_once(board):
    states = [board.show(margin_celsius=margin).state.name for margin in (12, 10, 8, 6, 5, 4, 3, 2, 1)]
    assert states == ["NOMINAL", *["WARM"] * 3, *["HOT"] * 4, "CRITICAL"]
    assert board.decisions[-1].reasons == ("temperature",)


def test_it_comes_down_one_step_at_a_time_after_a_calm_while(board):
    board.show(5, margin_celsius=0.5)
    states = [board.show(margin_celsius=30.0).state.name for _ in range(300)]
    lasted = {state: len(list(group)) for state, group in itertools.groupby(states)}
    assert list(lasted) == ["CRITICAL", "HOT", "WARM", "NOMINAL"]
    assert (lasted["CRITICAL"], lasted["HOT"], lasted["WARM"]) == (9, 120, 120)


def test_noise_around_a_threshold_changes_the_state_once(board):
    for margin in [5.3, 4.8] * 400:
        board.show(margin_celsius=margin)
    states = [decision.state for decision in board.decisions]
    assert sum(a is not b for a, b in itertools.pairwise(states)) == 1


def test_a_critical_board_refuses_and_says_for_how_long(board):
    board.show(5, margin_celsius=0.5)
    assert board.decisions[-1].refusing
    assert board.decisions[-1].pace == GovernorSettings().min_pace
    assert board.decisions[-1].retry_after_s == 30
    cooling = board.ramp(0.0, 0.9, 8)
    assert cooling.retry_after_s == pytest.approx((3.0 - 0.9) / (0.9 / 8), rel=0.05)
    assert not board.show(20, margin_celsius=9.0).refusing


def test_a_critical_board_crawls_whatever_it_has_learned(board):
    assert board.show(1500, margin_celsius=3.4).pace > 0.9
    assert board.show(margin_celsius=0.9).pace == GovernorSettings().min_pace


def test_a_board_that_will_cross_in_a_moment_is_critical_before_it_does(board):
    board.show(10, margin_celsius=30.0)
    assert board.show(margin_celsius=20.0).state is not State.CRITICAL
    assert board.show(margin_celsius=10.0).state is State.CRITICAL


def test_the_pace_falls_before_the_target_is_reached(board):
    board.show(10, margin_celsius=25.0)
    assert board.ramp(25.0, 8.0, 30).pace < 0.9


def test_one_wild_sample_costs_seconds_and_changes_no_state(board):
    board.show(20, margin_celsius=20.0)
    board.show(margin_celsius=14.0)
    assert board.show(10, margin_celsius=20.0).pace == 1.0
    assert board.decisions[-1].state is State.NOMINAL


def test_an_idle_board_teaches_nothing(board):
    board.show(300, margin_celsius=2.0)
    before = board.governor._temperature._controller._learned
    board.show(600, margin_celsius=12.0, busy=False)
    assert board.governor._temperature._controller._learned == before


def test_a_sensor_that_misses_a_record_or_two_changes_nothing(board):
    before = board.show(20, margin_celsius=6.0)
    board.show(3)
    assert all(d.state is before.state for d in board.decisions[-3:])
    assert not board.show(margin_celsius=6.0).refusing


def test_a_sensor_lost_while_hot_refuses_until_it_is_back(board):
    board.show(20, margin_celsius=4.0)
    decision = board.show(5)
    assert (decision.state, decision.refusing) == (State.CRITICAL, True)
    assert board.show(600).refusing
    assert not board.show(60, margin_celsius=20.0).refusing


def test_a_sensor_lost_while_cool_slows_down_to_the_floor_and_refuses_nobody(board):
    board.show(20, margin_celsius=40.0)
    decision = board.show(180)
    assert (decision.state, decision.refusing, decision.pace) == (State.HOT, False, 0.02)
    assert decision.reasons == ("temperature",)


def test_a_board_without_trip_points_is_governed_by_the_settings_or_not_at_all():
    record = telemetry_pb2.Telemetry(monotonic_ns=5)
    record.thermal.max_celsius = 80.0
    assert observe(record).margin_celsius is None
    assert observe(record, trip_celsius=95.0).margin_celsius == 15.0
    record.thermal.margin_celsius = 10.0
    assert observe(record, trip_celsius=95.0).margin_celsius == 10.0
    assert Board().show(50).state is State.NOMINAL


def test_a_record_tells_what_it_has_and_nothing_else():
    empty = observe(telemetry_pb2.Telemetry(monotonic_ns=2_500_000_000))
    assert empty == Observation(at_s=2.5)
    record = telemetry_pb2.Telemetry(monotonic_ns=1)
    record.power.total_mw = 9000
    record.power.over_current.add(kind="average", events=3)
    record.memory.available_bytes = 7
    record.memory.pressure_some_percent = 1.5
    record.runtime.state = "serving"
    seen = observe(record)
    assert (seen.power_mw, seen.over_current, seen.available_bytes) == (9000, {"average": 3}, 7)
    assert (seen.stalled_percent, seen.busy) == (1.5, False)
    record.runtime.waiting_requests = 1
    assert observe(record).busy


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_no_number_counts_as_absent(wrong):
    record = telemetry_pb2.Telemetry()
    record.thermal.margin_celsius = record.thermal.max_celsius = record.power.total_mw = wrong
    seen = observe(record, trip_celsius=90)
    assert (seen.margin_celsius, seen.power_mw) == (None, None)


def test_power_is_held_at_the_budget():
    board, pace = Board(power_budget_mw=15_000), 1.0
    figures = []
    for _ in range(300):
        figures.append(6000 + 16_000 * pace)
        pace = board.show(power_mw=figures[-1]).pace
    settled = figures[-100:]
    assert max(settled) < 15_300
    assert min(settled) > 14_700
    assert board.decisions[-1].reasons == ("power",)
    assert board.decisions[-1].state is State.WARM


def test_over_current_cuts_the_pace_and_lets_it_recover_slowly(board):
    board.show(10, over_current={"average": 7})
    assert board.decisions[-1].pace == 1.0
    hit = board.show(over_current={"average": 8})
    assert (hit.state, hit.reasons, hit.pace) == (State.HOT, ("over_current",), 0.7)
    assert board.show(over_current={"average": 9}).pace == pytest.approx(0.49)
    paces = [board.show(over_current={"average": 9}).pace for _ in range(102)]
    assert paces == sorted(paces)
    assert paces[20] == pytest.approx(0.595)
    assert paces[-1] == 1.0


@pytest.mark.parametrize(
    ("counts", "events"),
    [
        ([5, 5, 5], 0),
        ([5, 0, 0], 0),  # began anew
        ([5, 2, 2], 1),  # began anew, and has counted since
        ([5, None, 5], 0),  # could not be read once
        ([5, None, 6], 1),
        ([None, 9, 9], 0),  # what came before the agent is not its doing
    ],
)
def test_over_current_counts_what_is_new(board, counts, events):
    for count in counts:
        board.show(over_current={} if count is None else {"instantaneous": count})
    fallen = sum(b.pace < a.pace for a, b in itertools.pairwise(board.decisions))
    assert fallen == events


def test_memory_pressure_halves_what_runs_at_once_and_it_returns_one_by_one(board):
    board.show(10, available_bytes=PLENTY)
    pressed = board.show(16, available_bytes=HEADROOM // 4)
    assert (pressed.max_sequences, pressed.reasons, pressed.state) == (1, ("memory",), State.HOT)
    relieved = [board.show(available_bytes=PLENTY).max_sequences for _ in range(300)]
    assert relieved == sorted(relieved)
    assert relieved[28] == 1
    assert relieved[-1] == 8


def test_between_pressure_and_plenty_nothing_moves(board):
    board.show(5, available_bytes=0)
    assert board.show(300, available_bytes=HEADROOM - MIB).max_sequences == 4


def test_the_strongest_reason_comes_first(board):
    board.show(margin_celsius=9.0, over_current={"average": 1}, available_bytes=PLENTY)
    decision = board.show(margin_celsius=9.0, over_current={"average": 2}, available_bytes=PLENTY)
    assert decision.reasons == ("over_current", "temperature")
    decision = board.show(margin_celsius=0.5, over_current={"average": 3}, available_bytes=0)
    assert decision.reasons == ("temperature", "over_current", "memory")


def test_a_record_that_comes_twice_or_late_changes_nothing(board):
    first = board.show(margin_celsius=20.0)
    again = Observation(board.now, margin_celsius=0.0)
    assert board.governor.update(again) is first
    assert board.governor.update(Observation(board.now - 50, margin_celsius=0.0)) is first


def test_a_clock_that_stalled_does_not_count_as_time_of_load(board):
    board.show(60, margin_celsius=2.0)
    before = board.governor._temperature._controller._learned
    board.show(every_s=86_400.0, margin_celsius=2.0)
    after = board.governor._temperature._controller._learned
    assert before - after <= 0.08 / 40 * 1.0 * 5 + 1e-9


ANYTHING = st.one_of(st.none(), st.floats(-50, 120))


@settings(max_examples=60, deadline=None)
@given(
    seen=st.lists(
        st.tuples(
            ANYTHING,
            st.one_of(st.none(), st.floats(0, 1e6)),
            st.integers(0, 1 << 40),
            st.integers(0, 5),
            st.booleans(),
            st.sampled_from([0.0, 0.1, 1.0, 1.0, 1.0, 7.0, 1e6]),
        ),
        min_size=1,
        max_size=150,
    )
)
def test_whatever_the_sensors_say_a_decision_is_whole_and_seldom_changes(seen):
    board = Board(power_budget_mw=15_000)
    for margin, power, available, events, busy, every_s in seen:
        decision = board.show(
            every_s=every_s,
            margin_celsius=margin,
            power_mw=power,
            available_bytes=available,
            over_current={"average": events},
            busy=busy,
        )
        assert 0.02 <= decision.pace <= 1.0
        assert 1 <= decision.max_sequences <= 8
        assert decision.refusing == (decision.state is State.CRITICAL)
        assert (decision.state is State.NOMINAL) == (not decision.reasons)
        assert not decision.refusing or 10 <= decision.retry_after_s <= 120
        assert decision.to_proto(15_000).state == decision.state.name
    falls = sum(b.state < a.state for a, b in itertools.pairwise(board.decisions))
    assert falls <= 1 + board.now / 10


@given(seed=st.integers(0, 1 << 32), coldest=st.floats(5, 60))
@settings(max_examples=15, deadline=None)
def test_the_state_cannot_flap_however_the_margin_jumps(seed, coldest):
    board, rng = Board(), random.Random(seed)
    for _ in range(600):
        board.show(margin_celsius=rng.uniform(-5, coldest))
    states = [decision.state for decision in board.decisions]
    falls_from_critical = sum(a is State.CRITICAL and b is State.HOT for a, b in itertools.pairwise(states))
    other_falls = sum(b < a for a, b in itertools.pairwise(states)) - falls_from_critical
    assert falls_from_critical <= 600 / 10
    assert other_falls <= 600 / 120


@pytest.mark.parametrize(
    "wrong",
    [
        {"hot_margin_celsius": 2.0},
        {"critical_margin_celsius": 3.0},
        {"min_pace": 0.0},
        {"power_budget_mw": 5.0},
        {"power_modes": {"BOILING": "15W"}},
        {"power_modes": {"HOT": "15W; reboot"}},
        {"power_modes": {"HOT": "../15W"}},
        {"unknown": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        GovernorSettings(**wrong)
