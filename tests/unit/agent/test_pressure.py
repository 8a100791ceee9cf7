from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.engine.pressure import PressureGuard, Reading, read_pressure

MIB = 1 << 20
GRANTED, FLOOR, HEADROOM = 800 * MIB, 50 * MIB, 512 * MIB


class Kernel:
    def __init__(self, available=HEADROOM, stalled=0.0):
        self.reading = Reading(available, stalled)

    def __call__(self):
        return self.reading


def guard(kernel):
    return PressureGuard(GRANTED, FLOOR, HEADROOM, kernel)


def test_a_quiet_device_keeps_what_was_granted():
    assert guard(Kernel()).update(GRANTED) == GRANTED


def test_what_others_have_taken_from_the_headroom_is_given_back_at_once():
    assert guard(Kernel(available=100 * MIB)).update(used_bytes=600 * MIB) == (600 - 412) * MIB


def test_tasks_that_stall_for_memory_count_as_pressure_before_the_reserve_is_touched():
    assert guard(Kernel(available=HEADROOM - MIB, stalled=50.0)).update(GRANTED) == GRANTED - GRANTED // 8


def test_tasks_that_stall_for_another_reason_cost_nothing():
    assert guard(Kernel(available=2 * HEADROOM, stalled=50.0)).update(GRANTED) == GRANTED


def test_a_cache_that_holds_nothing_only_stops_growing():
    assert guard(Kernel(available=0)).update(used_bytes=0) == FLOOR


def test_between_reserve_and_headroom_nothing_moves():
    held = guard(Kernel(available=HEADROOM - 1))
    held.bound_bytes = 300 * MIB
    assert held.update(300 * MIB) == 300 * MIB


def test_the_cache_grows_again_when_more_than_the_headroom_is_free():
    kernel = Kernel(available=100 * MIB)
    relieved = guard(kernel)
    low = relieved.update(600 * MIB)
    kernel.reading = Reading(4 * HEADROOM, 0.0)
    bounds = [relieved.update(low) for _ in range(10)]
    assert bounds == sorted(bounds)
    assert bounds[0] > low
    assert bounds[-1] == GRANTED


@given(st.lists(st.tuples(st.integers(0, 2**34), st.floats(0, 100), st.integers(0, GRANTED)), max_size=40))
def test_the_bound_stays_between_floor_and_grant(readings):
    kernel = Kernel()
    tried = guard(kernel)
    for available, stalled, used in readings:
        kernel.reading = Reading(available, stalled)
        assert FLOOR <= tried.update(used) <= GRANTED


def test_pressure_is_read_from_the_kernels_files(tmp_path):
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "proc/pressure/memory").write_text("some avg10=12.50 avg60=0.00 avg300=0.00 total=1\n")
    assert read_pressure(tmp_path) == Reading(1_024_000, 12.5)
    (tmp_path / "proc/pressure/memory").unlink()
    assert read_pressure(tmp_path) == Reading(1_024_000, 0.0)
