"""SmoothQuant: the outputs of products of 8-bit integers, beside those of the float layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.layer import READERS, Int8Tensor, Point
from edgellm_buildhost.quantization.smoothquant import SmoothQuant, expected_error, smoothing
from tests.support.numpy_layer import forward, statistics_of
from tests.support.random_layers import (
    ARCHITECTURES,
    loud_inputs,
    outputs_error,
    plain_architecture,
    random_layer,
    random_statistics,
)


def product(matrix: Int8Tensor, inputs: np.ndarray) -> np.ndarray:
    """As an engine computes it: integers times integers, then both scales."""
    codes = np.clip(np.rint(inputs / matrix.input_scale), -128, 127).astype(np.int32)
    return (codes @ matrix.codes.T.astype(np.int32)) * matrix.scales * matrix.input_scale


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_smoothed_8_bit_products_are_closer_than_unsmoothed_ones(architecture) -> None:
    weights = random_layer(architecture)
    hidden = loud_inputs(400, architecture.hidden_size)
    float_inputs = forward(architecture, 0, weights, hidden).inputs
    statistics = {point: statistics_of(seen) for point, seen in float_inputs.items()}
    errors = {}
    for name, method in {"smoothed": SmoothQuant(), "not": SmoothQuant(alphas=())}.items():
        rounded = method.quantize(architecture, 0, weights, statistics)
        inputs = forward(architecture, 0, rounded.dequantize(), hidden).inputs
        # The norms are the same up to their folded scales, so the inputs are too, but for rounding before.
        errors[name] = outputs_error(
            product(rounded.linears["mlp.gate_proj"], inputs[Point.FFN]),
            float_inputs[Point.FFN] @ weights.linears["mlp.gate_proj"].T,
        )
    assert errors["smoothed"] < errors["not"]
    assert errors["smoothed"] < 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_smoothed_layer_stands_for_the_same_function(architecture) -> None:
    weights = random_layer(architecture)
    rounded = SmoothQuant(alphas=(0.5,)).quantize(
        architecture, 0, weights, random_statistics(architecture, weights)
    )
    hidden = loud_inputs(50, architecture.hidden_size, seed=5)
    expected = forward(architecture, 0, weights, hidden).hidden
    assert outputs_error(forward(architecture, 0, rounded.dequantize(), hidden).hidden, expected) < 1e-3


def test_every_input_that_calibration_saw_fits_its_codes() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    rounded = SmoothQuant().quantize(architecture, 0, weights, statistics)
    hidden = loud_inputs(400, architecture.hidden_size)
    inputs = forward(architecture, 0, rounded.dequantize(), hidden).inputs[Point.ATTENTION]
    for part in READERS[Point.ATTENTION]:
        linear = rounded.linears[part]
        assert isinstance(linear, Int8Tensor)
        assert np.abs(inputs).max() <= linear.input_scale * 127 * 1.001
        assert linear.codes.min() >= -127


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_the_error_that_the_search_expects_is_that_of_the_rounded_product(seed) -> None:
    rng = np.random.default_rng(seed)
    inputs = loud_inputs(2000, 48, seed)
    weight = rng.standard_normal((24, 48)).astype(np.float32)
    seen = statistics_of(inputs)
    scales = smoothing(seen.max_abs, np.abs(weight).max(axis=0), 0.5)
    folded = weight * scales
    steps = np.abs(folded).max(axis=1) / np.float32(127)
    codes = np.rint(folded / steps[:, None]).astype(np.int8)
    matrix = Int8Tensor(codes, steps, float((seen.max_abs / scales).max()) / 127)
    real = np.square(product(matrix, inputs / scales) - inputs @ weight.T).sum(axis=1).mean()
    assert 0.3 * real <= expected_error(weight, seen, scales) <= 3 * real


def test_a_silent_text_and_dead_channels_stay_finite() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = dict(random_statistics(architecture, weights))
    silent = statistics[Point.FFN]
    statistics[Point.FFN] = replace(
        silent, gram=silent.gram * 0, mean_abs=silent.mean_abs * 0, max_abs=silent.max_abs * 0
    )
    half = (np.arange(64) % 2).astype(np.float32)
    statistics[Point.ATTENTION] = replace(
        statistics[Point.ATTENTION], max_abs=statistics[Point.ATTENTION].max_abs * half
    )
    rounded = SmoothQuant().quantize(architecture, 0, weights, statistics)
    for array in (rounded.dequantize().linears | dict(rounded.vectors)).values():
        assert np.isfinite(array).all()


def test_missing_statistics_are_one_clear_error() -> None:
    architecture = plain_architecture()
    with pytest.raises(BuildError, match="needs statistics"):
        SmoothQuant().quantize(architecture, 0, random_layer(architecture), None)
