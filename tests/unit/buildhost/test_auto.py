"""Mixed bits: never above the budget, and never worse for more of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_buildhost.footprint import stored_bytes
from edgellm_buildhost.graph.minima import fold_minima
from edgellm_buildhost.quantization.auto import Mixed, Sensitivity, Way, choose, sensitivity
from edgellm_buildhost.quantization.awq import Awq
from edgellm_buildhost.quantization.gptq import Gptq
from edgellm_buildhost.quantization.grid import Grid, Rounding, pack_codes, quantize
from edgellm_buildhost.quantization.layer import READERS, FloatLayer, Point
from edgellm_buildhost.quantization.rtn import RoundToNearest
from edgellm_buildhost.survey import relative_error
from tests.support.random_layers import plain_architecture, random_layer, random_statistics

COARSE = Rounding(4, 64, Grid.SYMMETRIC)
CLOSER = Rounding(4, 32, Grid.FLOAT_MINIMUM)
CLOSEST = Rounding(8, 64, Grid.SYMMETRIC)
ROUNDINGS = (COARSE, CLOSER, CLOSEST)


@st.composite
def sensitivities(draw) -> list[Sensitivity]:
    found = []
    for layer in range(draw(st.integers(1, 4))):
        for point in Point:
            # Exact in floats, so that differences are.
            errors = st.integers(0, 1024).map(lambda parts: parts / 1024)
            ways = [Way(rounding, draw(st.integers(1, 50)), draw(errors)) for rounding in ROUNDINGS]
            found.append(Sensitivity(layer, point, tuple(ways)))
    return found


def taken(found, chosen) -> list[Way]:
    return [way for item in found for way in item.ways if way.rounding == chosen[item.place]]


def size_of(found, chosen) -> int:
    return sum(way.size_bytes for way in taken(found, chosen))


def error_of(found, chosen) -> float:
    return sum(way.error for way in taken(found, chosen))


def least(found) -> int:
    return sum(item.smallest.size_bytes for item in found)


@given(sensitivities(), st.integers(0, 500), st.integers(0, 500))
@settings(deadline=None)
def test_the_budget_is_kept_and_more_of_it_is_never_worse(found, more, still_more) -> None:
    small, large = (choose(found, least(found) + extra) for extra in (more, more + still_more))
    assert size_of(found, small) <= least(found) + more
    assert size_of(found, large) <= least(found) + more + still_more
    assert error_of(found, large) <= error_of(found, small) + 1e-9


@given(sensitivities())
@settings(deadline=None)
def test_with_bytes_enough_all_have_their_least_error_and_the_order_does_not_matter(found) -> None:
    chosen = choose(found, 10**6)
    assert error_of(found, chosen) == pytest.approx(sum(min(w.error for w in item.ways) for item in found))
    assert choose(list(reversed(found)), 10**6) == chosen
    assert set(chosen) == {item.place for item in found}


@given(sensitivities())
@settings(deadline=None)
def test_each_step_at_a_place_gains_less_for_a_byte_than_the_one_before(found) -> None:
    for item in found:
        gains = [step.gain_per_byte for step in item.steps()]
        assert all(gain > 0 for gain in gains)
        assert all(gains[k + 1] <= gains[k] * (1 + 1e-9) for k in range(len(gains) - 1))


def ways(*figures: tuple[int, float]) -> tuple[Way, ...]:
    return tuple(Way(rounding, *pair) for rounding, pair in zip(ROUNDINGS, figures, strict=False))


def test_what_gains_most_for_a_byte_comes_first() -> None:
    found = [
        Sensitivity(0, Point.ATTENTION, ways((10, 0.5), (12, 0.3), (20, 0.0))),
        Sensitivity(0, Point.FFN, ways((10, 0.6), (30, 0.0))),
        Sensitivity(1, Point.ATTENTION, ways((10, 0.2), (20, 0.1))),
    ]
    places = [item.place for item in found]
    # A tenth for each byte of the first step, then 0.0375, 0.03 and 0.01.
    assert choose(found, 32) == dict(zip(places, (CLOSER, COARSE, COARSE), strict=True))
    assert choose(found, 40) == dict(zip(places, (CLOSEST, COARSE, COARSE), strict=True))
    assert choose(found, 60) == dict(zip(places, (CLOSEST, CLOSER, COARSE), strict=True))
    assert choose(found, 70) == dict(zip(places, (CLOSEST, CLOSER, CLOSER), strict=True))


def test_a_way_that_is_larger_and_no_better_is_never_chosen() -> None:
    found = [Sensitivity(0, Point.FFN, ways((10, 0.1), (20, 0.2), (30, 0.1)))]
    assert set(choose(found, 1000).values()) == {COARSE}


def test_a_budget_below_the_smallest_everywhere_is_refused() -> None:
    found = [Sensitivity(0, point, ways((1000, 0.1), (2000, 0.0))) for point in Point]
    with pytest.raises(ValueError, match="the smallest ways take 1 bytes more"):
        choose(found, 3999)
    assert set(choose(found, 4000).values()) == {COARSE}


def test_a_layer_tells_sizes_and_errors_of_every_way() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)

    def harm(changed: FloatLayer) -> float:
        differ = [part for part in weights.linears if changed.linears[part] is not weights.linears[part]]
        assert set(differ) in [set(parts) for parts in READERS.values()]
        return sum(float(np.square(changed.linears[p] - weights.linears[p]).sum()) for p in differ)

    found = sensitivity(
        architecture, 1, weights, statistics, roundings=ROUNDINGS, size=stored_bytes, harm=harm
    )
    assert [item.place for item in found] == [(1, point) for point in Point]
    for item in found:
        coarse, closer, closest = item.ways
        assert 0 < closest.error < 0.02 * coarse.error
        assert closer.error < coarse.error
        assert coarse.size_bytes < closer.size_bytes < closest.size_bytes
        shapes = [weights.linears[part].shape for part in READERS[item.point]]
        assert coarse.size_bytes == sum(stored_bytes(*shape, COARSE) for shape in shapes)


def test_the_error_of_a_token_counts_relative_to_its_own_length() -> None:
    expected = np.array([[[3.0, 4.0], [300.0, 400.0]]], np.float32)
    assert relative_error(expected, expected) == 0.0
    for token in range(2):
        error = np.zeros_like(expected)
        error[0, token] = expected[0, token]
        assert relative_error(expected + error, expected) == pytest.approx(0.5)
    assert relative_error(np.ones((1, 1, 2), np.float32), np.zeros((1, 1, 2), np.float32)) > 1


@pytest.mark.parametrize("columns", [64, 96, 100])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grid", Grid)
def test_stored_bytes_are_those_of_the_arrays_that_a_graph_gets(grid, bits, columns) -> None:
    rounding = Rounding(bits, 32, grid)
    matrix = np.random.default_rng(0).standard_normal((10, columns)).astype(np.float32)
    weight = quantize(matrix, bits, 32, rounding.for_width(columns).grid)
    if weight.minima is not None:
        weight = fold_minima(weight)
    arrays = [pack_codes(weight.codes, bits), weight.scales]
    if weight.zero_points is not None:
        arrays.append(pack_codes(weight.zero_points, bits))
    assert stored_bytes(10, columns, rounding) == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("method", [RoundToNearest(COARSE), Awq(COARSE), Gptq(COARSE)])
def test_a_mixed_layer_is_rounded_at_each_point_as_was_chosen(method) -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    choice = dict(zip([(0, point) for point in Point], (CLOSEST, CLOSER, COARSE, COARSE), strict=True))
    mixed = Mixed(method, choice)
    assert (mixed.needs_statistics, mixed.sequential) == (method.needs_statistics, method.sequential)
    rounded = mixed.quantize(architecture, 0, weights, statistics)
    for point, parts in READERS.items():
        for part in parts:
            linear = rounded.linears[part]
            assert (linear.bits, linear.group_size) == (choice[0, point].bits, choice[0, point].group_size)
            assert (linear.minima is not None) is (choice[0, point].grid is Grid.FLOAT_MINIMUM)
