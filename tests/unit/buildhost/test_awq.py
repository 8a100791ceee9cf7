"""AWQ: the function of a layer stays, and errors on the text do not grow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import EdgellmError
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization import awq as awq_module
from edgellm_buildhost.quantization.awq import Awq, gram_error
from edgellm_buildhost.quantization.folding import fold, rescaled, shared
from edgellm_buildhost.quantization.grid import Grid, Rounding
from edgellm_buildhost.quantization.layer import READERS, Point
from edgellm_buildhost.quantization.rtn import RoundToNearest
from tests.support.numpy_layer import forward, statistics_of
from tests.support.random_layers import (
    ARCHITECTURES,
    loud_inputs,
    plain_architecture,
    point_width,
    random_layer,
    random_statistics,
)

METHOD = Awq(Rounding(4, 32, Grid.SYMMETRIC))


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def architecture(request):
    return request.param


def random_scales(architecture, seed):
    rng = np.random.default_rng(seed)
    return {
        point: shared(
            architecture,
            point,
            np.exp(rng.standard_normal(point_width(architecture, point))).astype(np.float32),
        )
        for point in Point
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folding_scales_does_not_change_what_a_layer_computes(architecture, seed) -> None:
    weights, scales = random_layer(architecture, seed), random_scales(architecture, seed)
    hidden = loud_inputs(24, architecture.hidden_size).astype(np.float64)
    before = forward(architecture, 0, weights, hidden)
    after = forward(architecture, 0, fold(architecture, weights, scales), hidden)
    np.testing.assert_allclose(
        after.hidden, before.hidden, rtol=1e-4, atol=1e-4 * np.abs(before.hidden).max()
    )
    for point in Point:
        expected = before.inputs[point] / scales[point]
        np.testing.assert_allclose(
            after.inputs[point], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )


def test_folding_leaves_the_given_layer_alone(architecture) -> None:
    weights = random_layer(architecture)
    copies = {name: array.copy() for name, array in (weights.linears | weights.vectors).items()}
    fold(architecture, weights, random_scales(architecture, 3))
    for name, array in (weights.linears | weights.vectors).items():
        np.testing.assert_array_equal(array, copies[name])


def test_rescaled_statistics_are_those_of_the_folded_layer(architecture) -> None:
    weights, scales = random_layer(architecture), random_scales(architecture, 4)
    hidden = loud_inputs(24, architecture.hidden_size)
    before, after = (
        forward(architecture, 0, layer, hidden).inputs
        for layer in (weights, fold(architecture, weights, scales))
    )
    for point in Point:
        told, seen = rescaled(statistics_of(before[point]), scales[point]), statistics_of(after[point])
        for name in ("gram", "mean_abs", "max_abs"):
            expected = getattr(seen, name)
            np.testing.assert_allclose(
                getattr(told, name), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
            )


def test_query_heads_that_read_one_value_share_its_scale() -> None:
    architecture = plain_architecture()
    figures = np.arange(64, dtype=np.float32)
    common = shared(architecture, Point.ATTENTION_OUTPUT, figures).reshape(2, 2, 16)
    np.testing.assert_array_equal(common[:, 0], common[:, 1])
    np.testing.assert_array_equal(common[0, 0], (figures[:16] + figures[16:32]) / 2)
    np.testing.assert_array_equal(shared(architecture, Point.FFN, figures), figures)


def test_scaling_before_rounding_keeps_the_function(architecture) -> None:
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    scales, _ = METHOD.search(architecture, weights, statistics)
    folded = fold(architecture, weights, scales)
    hidden = loud_inputs(24, architecture.hidden_size, seed=9).astype(np.float64)
    before = forward(architecture, 0, weights, hidden).hidden
    after = forward(architecture, 0, folded, hidden).hidden
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3 * np.abs(before).max())
    assert scales


@given(st.integers(0, 2**31), st.sampled_from(Grid))
@settings(deadline=None, max_examples=10)
def test_the_error_on_the_text_is_never_larger_than_that_of_plain_rounding(seed, grid) -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture, seed)
    statistics = random_statistics(architecture, weights, seed)
    rounding = Rounding(4, 32, grid)
    plain = RoundToNearest(rounding, clip=False).quantize(architecture, 0, weights, None).dequantize()
    method = Awq(rounding)
    rounded = method.quantize(architecture, 0, weights, statistics).dequantize()
    scales, _ = method.search(architecture, weights, statistics)
    # Taken back, so that both stand for the same matrices: rows and columns by the inverse scales.
    unfolded = fold(architecture, rounded, {point: 1 / by for point, by in scales.items()})
    for point, parts in READERS.items():
        gram = statistics[point].gram
        ours, theirs = (
            sum(gram_error(layer.linears[part] - weights.linears[part], gram) for part in parts)
            for layer in (unfolded, plain)
        )
        assert ours <= theirs * 1.001


def test_loud_channels_are_worth_a_scale() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    scales, _ = METHOD.search(architecture, weights, statistics)
    assert scales
    for point, by in scales.items():
        loud = statistics[point].mean_abs.argmax()
        assert by[loud] >= np.median(by)


def test_eight_bits_are_not_scaled() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    result = Awq(Rounding(8, 32, Grid.SYMMETRIC)).quantize(
        architecture, 0, weights, random_statistics(architecture, weights)
    )
    for name, vector in weights.vectors.items():
        np.testing.assert_array_equal(result.vectors[name], vector)


def test_equal_arguments_give_equal_results() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    first, second = (METHOD.quantize(architecture, 0, weights, statistics) for _ in range(2))
    for part in weights.linears:
        np.testing.assert_array_equal(first.linears[part].codes, second.linears[part].codes)


def test_channels_that_the_text_never_woke_stay_finite() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = dict(random_statistics(architecture, weights))
    for point, seen in statistics.items():
        awake = np.ones(len(seen.mean_abs), np.float32)
        awake[::3] = 0 if point is not Point.FFN else awake[::3]
        if point is Point.ATTENTION:
            awake[:] = 0
        statistics[point] = replace(
            seen, gram=seen.gram * awake * awake[:, None], mean_abs=seen.mean_abs * awake
        )
    result = METHOD.quantize(architecture, 0, weights, statistics).dequantize()
    for array in (result.linears | result.vectors).values():
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda seen: replace(seen, gram=seen.gram * np.float32(np.nan)), "gram holds values"),
        (lambda seen: replace(seen, mean_abs=seen.mean_abs[1:]), "mean_abs has shape"),
        (lambda seen: replace(seen, max_abs=seen.max_abs + np.float32(np.inf)), "max_abs holds values"),
        (lambda seen: replace(seen, tokens=0), "no tokens"),
    ],
)
def test_damaged_statistics_are_one_clear_error(damage, told) -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = dict(random_statistics(architecture, weights))
    statistics[Point.FFN] = damage(statistics[Point.FFN])
    with pytest.raises(BuildError, match=f"layer 1: statistics of point ffn: .*{told}"):
        METHOD.quantize(architecture, 1, weights, statistics)


def test_missing_statistics_are_one_clear_error() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    with pytest.raises(EdgellmError, match="layer 0: this method needs statistics"):
        METHOD.quantize(architecture, 0, weights, None)
    with pytest.raises(BuildError, match="point attention: is missing"):
        METHOD.quantize(architecture, 0, weights, {})


def test_the_search_looks_at_a_bounded_number_of_rows(monkeypatch) -> None:
    architecture = plain_architecture(ffn_size=2048)
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    seen = []
    original = awq_module.quantize_clipped
    monkeypatch.setattr(
        awq_module,
        "quantize_clipped",
        lambda weight, *rest: seen.append(len(weight)) or original(weight, *rest),
    )
    METHOD.search(architecture, weights, statistics)
    assert max(seen) <= 512
