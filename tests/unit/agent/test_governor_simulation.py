"""The governor on simulated boards: the trip point, the tokens that it costs, and how often it changes."""

from dataclasses import replace

from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from edgellm_agent.governor.settings import GovernorSettings
from tests.support.thermal_model import (
    TRIP_CELSIUS,
    Board,
    Capped,
    Governed,
    Simulation,
    air_rises,
    bursts,
    fan_fails_at,
)

# What is measured begins once a cold board has warmed up.
LONG_S, WARM_UP_S = 2400, 600
SETTINGS = GovernorSettings()
boards = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    # An example is a simulated hour and more: to shrink one would take minutes, and its figures say enough.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


@st.composite
def any_board(draw):
    """Plausible and less plausible boards: heat sinks of 40 s to 10 min, dies of 1 to 4 s."""
    die_to_sink = draw(st.floats(0.1, 0.6))
    sink_to_air = draw(st.floats(0.6, 4.0))
    board = Board(
        idle_w=draw(st.floats(3, 12)),
        dynamic_w=draw(st.floats(4, 40)),
        die_j_per_k=draw(st.floats(1, 4)) / die_to_sink,
        sink_j_per_k=draw(st.floats(40, 600)) / sink_to_air,
        die_to_sink_k_per_w=die_to_sink,
        sink_to_air_k_per_w=sink_to_air,
        air_celsius=draw(st.floats(-10, 70)),
        noise_celsius=draw(st.floats(0, 0.5)),
        quantum_celsius=draw(st.sampled_from([0.05, 0.5])),
    )
    # Crossing can be avoided at all; a full load would cross; a burst alone does not cross from the target.
    assume(board.steady_celsius(SETTINGS.min_pace) < TRIP_CELSIUS - 1.5)
    assume(board.steady_celsius(1.0) > TRIP_CELSIUS + 1.0)
    assume(board.dynamic_w * board.die_to_sink_k_per_w < 14)
    return board


@st.composite
def any_load(draw):
    """Always busy, in bursts that a record a second can follow, or idle at first."""
    kind = draw(st.sampled_from(["steady", "bursts", "late"]))
    if kind == "bursts":
        return bursts(draw(st.integers(5, 150)), draw(st.integers(5, 150)))
    begins_at_s = draw(st.integers(0, 900)) if kind == "late" else 0
    return lambda second: float(second >= begins_at_s)


@boards
@given(board=any_board(), load=any_load(), seed=st.integers(0, 1000), missing=st.sampled_from([0.0, 0.05]))
def test_the_trip_point_is_never_crossed_where_that_can_be_avoided(board, load, seed, missing):
    trace = Simulation(board, load, seed=seed, missing=missing).run(Governed(), LONG_S)
    assert trace.peak_celsius < TRIP_CELSIUS
    assert trace.throttled_s == 0


@boards
@given(board=any_board(), seed=st.integers(0, 1000))
def test_without_it_the_board_throttles_itself(board, seed):
    trace = Simulation(board, seed=seed).run(Capped(1.0), LONG_S)
    assert trace.crossed
    assert trace.throttled_s > 0


@boards
@given(board=any_board(), load=any_load(), seed=st.integers(0, 1000))
def test_it_gives_what_the_best_constant_cap_gives_that_keeps_the_target_margin(board, load, seed):
    simulation = Simulation(board, load, seed=seed)
    governed = simulation.run(Governed(), LONG_S)
    cap = simulation.best_cap(LONG_S, TRIP_CELSIUS - SETTINGS.target_margin_celsius)
    best = simulation.run(Capped(cap), LONG_S)
    assert governed.tokens(WARM_UP_S) >= 0.9 * best.tokens(WARM_UP_S)


@boards
@given(board=any_board(), load=any_load(), seed=st.integers(0, 1000))
def test_tokens_are_within_a_tenth_of_the_best_constant_cap_that_does_not_cross(board, load, seed):
    # Three degrees of margin are a tenth of what there is where an idle board is 30 degrees below its trip
    # point: on a hotter one, no margin that a sensor with an error of half a degree needs is so cheap.
    assume(board.steady_celsius(0.0) < TRIP_CELSIUS - 40)
    simulation = Simulation(board, load, seed=seed)
    governed = simulation.run(Governed(), LONG_S)
    best = simulation.run(Capped(simulation.best_cap(LONG_S)), LONG_S)
    assert governed.tokens(WARM_UP_S) >= 0.9 * best.tokens(WARM_UP_S)


@boards
@given(board=any_board(), seed=st.integers(0, 1000))
def test_under_a_steady_load_the_state_changes_a_few_times(board, seed):
    governed = Governed()
    Simulation(board, seed=seed).run(governed, LONG_S)
    assert governed.changes <= 8


@boards
@given(board=any_board(), load=any_load(), seed=st.integers(0, 1000))
def test_under_any_load_it_changes_no_more_than_once_a_minute(board, load, seed):
    governed = Governed()
    Simulation(board, load, seed=seed).run(governed, LONG_S)
    assert governed.changes <= LONG_S / 60


@boards
@given(board=any_board(), factor=st.floats(1.2, 4.0), seed=st.integers(0, 1000), at_s=st.integers(300, 1500))
def test_a_fan_that_fails_makes_it_hot_quickly_and_does_not_make_it_cross(board, factor, seed, at_s):
    failed = replace(board, sink_to_air_k_per_w=factor * board.sink_to_air_k_per_w)
    assume(failed.steady_celsius(SETTINGS.min_pace) < TRIP_CELSIUS - 1.5)
    simulation = Simulation(board, change=fan_fails_at(at_s, factor), seed=seed)
    assert simulation.run(Governed(), LONG_S).peak_celsius < TRIP_CELSIUS


@boards
@given(board=any_board(), kelvins=st.floats(5, 30), seed=st.integers(0, 1000))
def test_air_that_gets_hotter_does_not_make_it_cross(board, kelvins, seed):
    hot = replace(board, air_celsius=board.air_celsius + kelvins)
    assume(hot.steady_celsius(SETTINGS.min_pace) < TRIP_CELSIUS - 1.5)
    simulation = Simulation(board, change=air_rises(600, 300, kelvins), seed=seed)
    assert simulation.run(Governed(), LONG_S).peak_celsius < TRIP_CELSIUS


def test_a_burst_on_a_board_that_idled_itself_hot_does_not_cross():
    """It has learned nothing of its load yet, and full pace would cross within seconds."""
    board = Board(air_celsius=72.0, idle_w=6.0)
    assert TRIP_CELSIUS - 10 < board.steady_celsius(0.0) < TRIP_CELSIUS - 4
    load = bursts(40, 20)
    simulation = Simulation(board, lambda s: load(s) if s > 900 else 0.0, seed=3)
    assert simulation.run(Capped(1.0), 1000).crossed
    assert not simulation.run(Governed(), LONG_S).crossed
