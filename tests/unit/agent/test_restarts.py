"""Back-off between starts, and when deaths are a loop."""

from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.engine.restarts import Restarts

DEATHS, WINDOW_S = 5, 600.0


def loops(times):
    restarts = Restarts(DEATHS, WINDOW_S)
    return [at for at in times if restarts.died(at)]


def test_each_pause_is_twice_the_last_up_to_half_a_minute():
    restarts = Restarts(DEATHS, WINDOW_S)
    assert [restarts.next_pause_s() for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_worker_that_lived_for_a_while_starts_with_the_first_pause_again():
    restarts = Restarts(DEATHS, WINDOW_S)
    for _ in range(4):
        restarts.next_pause_s()
    restarts.died(100.0, lived_s=59.0)
    assert restarts.next_pause_s() == 8
    restarts.died(200.0, lived_s=61.0)
    assert restarts.next_pause_s() == 0.5


def test_so_many_deaths_within_the_window_are_a_loop_and_the_next_is_told_after_as_many_more():
    assert loops(range(10, 130, 10)) == [50, 100]


def test_deaths_that_are_further_apart_are_none():
    assert loops([i * (WINDOW_S / 4 + 1) for i in range(50)]) == []
    assert loops([i * WINDOW_S / 4 for i in range(5)]) == [WINDOW_S]


def test_deaths_of_long_ago_do_not_count():
    assert loops([0, 1, 2, 3, 700, 701, 702, 703, 704]) == [704]


@given(st.lists(st.floats(0, 400), max_size=40))
def test_a_loop_is_told_exactly_when_the_last_deaths_since_the_one_before_lie_in_one_window(gaps):
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    told, since = [], []
    for at in times:
        since.append(at)
        if len(since) >= DEATHS and at - since[-DEATHS] <= WINDOW_S:
            told.append(at)
            since = []
    assert loops(times) == told
