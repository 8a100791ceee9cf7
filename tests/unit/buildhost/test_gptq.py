"""GPTQ: what it makes of the errors before, on any gram that calibration may bring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.awq import gram_error
from edgellm_buildhost.quantization.gptq import Gptq, _cholesky_in_place, gptq
from edgellm_buildhost.quantization.grid import Grid, Rounding, quantize
from edgellm_buildhost.quantization.layer import READERS
from edgellm_buildhost.quantization.rtn import RoundToNearest
from tests.support.numpy_layer import forward
from tests.support.random_layers import (
    ARCHITECTURES,
    loud_inputs,
    outputs_error,
    plain_architecture,
    random_layer,
    random_statistics,
)

ROUNDING = Rounding(4, 32, Grid.SYMMETRIC)


def problem(seed: int, rows: int = 48, columns: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the gram of correlated inputs."""
    inputs = loud_inputs(4 * columns, columns, seed)
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return weight, inputs.T @ inputs / np.float32(len(inputs))


@given(st.integers(0, 2**31), st.sampled_from(Grid))
@settings(deadline=None, max_examples=15)
def test_the_error_on_the_text_is_much_smaller_than_that_of_plain_rounding(seed, grid) -> None:
    weight, gram = problem(seed)
    plain = quantize(weight, 4, 32, grid).dequantize()
    rounded = gptq(weight, gram, Rounding(4, 32, grid)).dequantize()
    assert gram_error(rounded - weight, gram) < 0.8 * gram_error(plain - weight, gram)


def test_with_uncorrelated_inputs_each_weight_goes_to_its_nearest_level() -> None:
    weight, _ = problem(0)
    rounded = gptq(weight, np.eye(96, dtype=np.float32), ROUNDING)
    values, step = rounded.dequantize(), np.repeat(rounded.scales, 32, axis=1)
    inside = (rounded.codes > 0) & (rounded.codes < 15)
    far = np.abs(values - weight) > 0.5001 * step
    assert not (far & inside.reshape(far.shape)).any()


def test_columns_of_a_group_are_found_in_their_own_places() -> None:
    weight, gram = problem(1)
    rounded = gptq(weight, gram, Rounding(8, 32, Grid.SYMMETRIC)).dequantize()
    # No column may stand where another one was: at 8 bits all stay close.
    assert np.corrcoef(rounded.ravel(), weight.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("columns", [80, 33, 20])
@pytest.mark.parametrize("grid", Grid)
def test_a_last_group_that_is_not_full_is_cut_off(columns, grid) -> None:
    weight, gram = problem(2, columns=columns)
    rounded = gptq(weight, gram, Rounding(4, 32, grid))
    assert rounded.dequantize().shape == weight.shape
    assert rounded.minima is None
    plain = quantize(weight, 4, 32, Rounding(4, 32, grid).for_width(columns).grid).dequantize()
    assert gram_error(rounded.dequantize() - weight, gram) < gram_error(plain - weight, gram)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_fewer_tokens_than_channels_make_a_singular_gram_that_works(tokens) -> None:
    weight, _ = problem(3)
    inputs = loud_inputs(tokens, 96)
    gram = inputs.T @ inputs / np.float32(tokens)
    rounded = gptq(weight, gram, ROUNDING).dequantize()
    assert np.isfinite(rounded).all()
    plain = quantize(weight, 4, 32, Grid.SYMMETRIC).dequantize()
    assert gram_error(rounded - weight, gram) < gram_error(plain - weight, gram)


def test_channels_that_the_text_never_woke_are_rounded_and_not_lost() -> None:
    weight, gram = problem(4)
    asleep = np.arange(0, 96, 5)
    gram[asleep] = 0
    gram[:, asleep] = 0
    rounded = gptq(weight, gram, ROUNDING).dequantize()
    assert outputs_error(rounded[:, asleep], weight[:, asleep]) < 0.05


def test_a_gram_of_zeros_is_plain_rounding_with_a_clip() -> None:
    weight, _ = problem(5)
    rounded = gptq(weight, np.zeros((96, 96), np.float32), ROUNDING).dequantize()
    assert outputs_error(rounded, weight) < 0.02


def test_an_ill_conditioned_gram_is_stable_in_float32() -> None:
    rng = np.random.default_rng(6)
    directions = np.linalg.qr(rng.standard_normal((256, 256)))[0]
    gram = ((directions * np.logspace(0, -12, 256)) @ directions.T).astype(np.float32)
    weight = rng.standard_normal((32, 256)).astype(np.float32)
    rounded = gptq(weight, gram, ROUNDING).dequantize()
    plain = quantize(weight, 4, 32, Grid.SYMMETRIC).dequantize()
    assert gram_error(rounded - weight, gram) < 0.5 * gram_error(plain - weight, gram)


@pytest.mark.parametrize("width", [96, 512, 1300])
def test_the_factor_made_in_place_is_that_of_the_whole_matrix(width) -> None:
    _, gram = problem(9, columns=width)
    gram[np.diag_indices(width)] += gram.diagonal().mean() * np.float32(0.01)
    expected = np.linalg.cholesky(gram.astype(np.float64))
    _cholesky_in_place(gram)
    np.testing.assert_allclose(np.tril(gram), expected, atol=2e-3 * np.abs(expected).max())


def test_a_gram_that_is_none_is_one_clear_error() -> None:
    weight, _ = problem(7)
    gram = np.eye(96, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 1e9
    with pytest.raises(BuildError, match="not positive semidefinite"):
        gptq(weight, gram, ROUNDING)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_whole_layer_computes_closer_to_its_float_self(architecture) -> None:
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    plain = RoundToNearest(ROUNDING, clip=False).quantize(architecture, 0, weights, None)
    method = Gptq(ROUNDING)
    rounded = method.quantize(architecture, 0, weights, statistics)
    hidden = loud_inputs(400, architecture.hidden_size)
    expected = forward(architecture, 0, weights, hidden).hidden
    ours, theirs = (
        outputs_error(forward(architecture, 0, layer.dequantize(), hidden).hidden, expected)
        for layer in (rounded, plain)
    )
    assert ours < theirs
    assert set(rounded.linears) == {part for parts in READERS.values() for part in parts}
    assert method.sequential


def test_equal_arguments_give_equal_results_and_leave_them_alone() -> None:
    weight, gram = problem(8)
    before = weight.copy(), gram.copy()
    first, second = gptq(weight, gram, ROUNDING), gptq(weight, gram, ROUNDING)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(gram, before[1])


def test_missing_statistics_are_one_clear_error() -> None:
    architecture = plain_architecture()
    with pytest.raises(BuildError, match="needs statistics"):
        Gptq(ROUNDING).quantize(architecture, 0, random_layer(architecture), None)
