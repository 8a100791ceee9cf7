"""What is tried again, how soon and for how long; how fast bytes may go out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.client import PushProgress, RateLimit
from edgellm.client._patience import Patience
from edgellm.client._rate import Meter
from edgellm.errors import DeviceUnreachableError, RemoteError

GONE = DeviceUnreachableError("nobody answers")
CONFLICT = RemoteError("another push", code="ABORTED", retry_after_s=0.5)
LOST = RemoteError("does not match", code="DATA_LOSS")


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def lasts_s(patience: Patience, clock: Clock, error: Exception) -> float:
    """How long it goes on when nothing changes."""
    began_s = clock.now_s

    def go_on():
        while True:
            clock.now_s += patience.pause_s(error)

    with pytest.raises(type(error)):
        go_on()
    return clock.now_s - began_s


def test_a_device_that_is_gone_is_waited_for_with_longer_and_longer_pauses():
    clock = Clock()
    patience = Patience(60, clock=clock)
    pauses = [patience.pause_s(GONE) for _ in range(7)]
    assert pauses == [0.25, 0.5, 1, 2, 4, 5, 5]


def test_patience_ends_after_its_time_without_progress():
    clock = Clock()
    assert 55 < lasts_s(Patience(60, clock=clock), clock, GONE) <= 60


def test_progress_gives_the_whole_time_again():
    clock = Clock()
    patience = Patience(60, clock=clock)
    for reached in range(1, 10):
        patience.pause_s(GONE)
        clock.now_s += 50
        patience.reached(reached)
    assert lasts_s(patience, clock, GONE) > 55


def test_the_same_offset_again_is_no_progress():
    clock = Clock()
    patience = Patience(60, offset_bytes=100, clock=clock)
    patience.pause_s(GONE)
    clock.now_s += 58
    patience.reached(100)
    assert lasts_s(patience, clock, GONE) <= 2


@pytest.mark.parametrize("error", [GONE, CONFLICT])
def test_without_patience_nothing_is_waited_for(error):
    with pytest.raises(type(error)):
        Patience(0).pause_s(error)


def test_another_push_that_has_stalled_is_waited_out_until_the_device_gives_it_up():
    clock = Clock()
    assert 115 < lasts_s(Patience(60, clock=clock), clock, CONFLICT) <= 120


def test_bytes_that_stay_wrong_are_given_up_whatever_progress_there_is():
    patience = Patience(60)
    for _ in range(2):
        assert patience.pause_s(LOST) == 0
        patience.reached(10)
    with pytest.raises(RemoteError):
        patience.pause_s(LOST)


def test_a_push_that_begins_again_from_zero_makes_progress():
    clock = Clock()
    patience = Patience(60, clock=clock)
    patience.reached(1000)
    patience.pause_s(LOST)
    patience.pause_s(GONE)
    clock.now_s += 59
    patience.reached(500)
    assert patience.pause_s(GONE) == 0.25


@pytest.mark.parametrize("code", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"])
def test_a_refusal_is_final(code):
    with pytest.raises(RemoteError):
        Patience(60).pause_s(RemoteError("no", code=code))


def test_a_device_that_has_too_much_to_do_is_asked_again():
    assert Patience(60).pause_s(RemoteError("busy", code="RESOURCE_EXHAUSTED", retry_after_s=2)) == 2


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 3)), min_size=1, max_size=50))
def test_all_who_share_a_rate_together_stay_below_it(sends):
    clock = Clock()
    rate, began_s, sent, last_s = RateLimit(100_000, clock), clock.now_s, 0, clock.now_s
    for size_bytes, pause_s in sends:
        clock.now_s += pause_s
        last_s = max(last_s, clock.now_s + rate.take(size_bytes))
        sent += size_bytes
    # A quarter of a second's bytes may go out at once.
    assert sent <= 100_000 * (last_s - began_s + 0.25) * 1.000001


def test_a_rate_is_used_to_the_full_by_one_who_keeps_to_it():
    clock = Clock()
    rate = RateLimit(100_000, clock)
    for _ in range(100):
        clock.now_s += rate.take(10_000)
    assert clock.now_s - 1000 == pytest.approx(10, abs=0.3)


def test_after_a_silence_only_a_quarter_of_a_second_s_bytes_go_out_at_once():
    clock = Clock()
    rate = RateLimit(100_000, clock)
    clock.now_s += 3600
    assert rate.take(25_000) == 0
    assert rate.take(100_000) == pytest.approx(1)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="bytes_per_s"):
        RateLimit(0)


def test_the_rate_shown_is_of_the_last_ten_seconds_and_gives_the_time_left():
    clock = Clock()
    meter = Meter(clock)
    meter.count(1_000_000)
    assert meter.bytes_per_s() == 0  # too soon to tell
    clock.now_s += 5
    assert meter.bytes_per_s() == 200_000
    clock.now_s += 7
    meter.count(50_000)
    assert meter.bytes_per_s() == 5_000
    assert PushProgress(50, 150, 20.0).left_s == 5
    assert PushProgress(50, 150).left_s is None
