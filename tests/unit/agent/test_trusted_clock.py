"""A time that does not go back, and that a wrong clock moves ahead only as far as it was wrong for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.trust.clock import WRITTEN_S, TrustedClock

TRUE_S = WRITTEN_S + 100 * 86_400.0
HOUR_S = 3600.0


class Board:
    def __init__(self, floor_s=0.0, wall_s=TRUE_S):
        self.wall_s, self.run_s, self.kept = wall_s, 0.0, []
        self.clock = TrustedClock(
            floor_s, self.kept.append, wall_s=lambda: self.wall_s, monotonic_s=lambda: self.run_s
        )

    def after(self, seconds):
        """Both clocks go on; what the trusted one says then."""
        self.run_s += seconds
        self.wall_s += seconds
        return self.clock.now_s()


def test_a_board_that_wakes_up_in_1970_is_no_earlier_than_the_agent():
    assert Board(wall_s=0.0).clock.now_s() == WRITTEN_S


def test_a_board_that_wakes_up_in_1970_is_no_earlier_than_it_was():
    board = Board(floor_s=TRUE_S, wall_s=5.0)
    assert board.after(HOUR_S) == TRUE_S


def test_a_right_clock_is_believed_at_once_however_far_behind_the_floor_is():
    assert Board(floor_s=0.0).clock.now_s() == TRUE_S


def test_the_floor_follows_a_right_clock():
    board = Board(floor_s=TRUE_S)
    board.after(10 * HOUR_S)
    board.wall_s = 0.0
    assert board.clock.now_s() == TRUE_S + 10 * HOUR_S


def test_a_clock_that_was_years_ahead_for_an_hour_costs_an_hour_at_most():
    board = Board(floor_s=TRUE_S, wall_s=TRUE_S + 50 * 365 * 86_400.0)
    board.after(HOUR_S)
    board.wall_s = TRUE_S + HOUR_S
    assert board.clock.now_s() <= TRUE_S + 2 * HOUR_S
    assert board.after(2 * HOUR_S) == TRUE_S + 3 * HOUR_S


def test_a_floor_that_fell_behind_catches_up_while_the_agent_runs():
    board = Board(floor_s=TRUE_S - 30 * 86_400.0)
    board.after(30 * 86_400.0)
    board.wall_s = 0.0
    assert board.clock.now_s() == TRUE_S + 30 * 86_400.0


def test_what_a_trusted_key_has_signed_moves_the_floor_and_is_kept_at_once():
    board = Board(floor_s=TRUE_S, wall_s=0.0)
    board.clock.witness(TRUE_S + HOUR_S)
    board.clock.witness(TRUE_S)
    assert board.clock.now_s() == TRUE_S + HOUR_S
    assert board.kept == [TRUE_S + HOUR_S]


def test_the_floor_is_written_every_ten_minutes_not_each_time():
    board = Board(floor_s=TRUE_S)
    for _ in range(60):
        board.after(60.0)
    assert len(board.kept) == 6


STEPS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e10, 1e10)), max_size=20)


@given(STEPS)
def test_the_trusted_time_is_never_before_the_floor_and_the_floor_never_outruns_the_agent(steps):
    board, floor_s = Board(floor_s=TRUE_S), TRUE_S
    for seconds, wall_s in steps:
        board.run_s += seconds
        board.wall_s = wall_s
        assert board.clock.now_s() >= max(wall_s, floor_s)
        board.wall_s = -1e12
        floor_s, before_s = board.clock.now_s(), floor_s
        assert before_s <= floor_s <= TRUE_S + 2 * board.run_s + 1e-3
