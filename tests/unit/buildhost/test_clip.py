"""Searched clip: never worse than the full range, and nothing lost on a grid."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgellm_buildhost.quantization.clip import LADDER, quantize_clipped, with_common_part
from edgellm_buildhost.quantization.grid import Grid, Rounding, quantize
from edgellm_buildhost.quantization.rtn import RoundToNearest
from tests.support.random_layers import loud_inputs, plain_architecture, random_layer

VALUES = st.floats(-100, 100, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 70)), elements=VALUES)
ROUNDINGS = st.builds(
    Rounding, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([16, 32]), grid=st.sampled_from(Grid)
)


def squared_error(rounded: np.ndarray, weight: np.ndarray) -> float:
    return float(np.square(rounded.astype(np.float64) - weight).sum())


@given(MATRICES, ROUNDINGS)
@settings(deadline=None)
def test_a_searched_range_is_never_worse_than_the_full_one(matrix, rounding) -> None:
    plain = quantize(matrix, rounding.bits, rounding.group_size, rounding.grid).dequantize()
    searched = quantize_clipped(matrix, rounding).dequantize()
    slack = 1e-5 * float(np.square(matrix).sum()) + 1e-9  # figures are of float32
    assert squared_error(searched, matrix) <= squared_error(plain, matrix) + slack


@given(MATRICES, ROUNDINGS)
@settings(deadline=None)
def test_scales_are_positive_and_codes_fit_their_bits(matrix, rounding) -> None:
    searched = quantize_clipped(matrix, rounding)
    assert (searched.scales >= 0).all()
    assert searched.codes.max() < 1 << rounding.bits
    assert searched.dequantize().shape == matrix.shape


@pytest.mark.parametrize("grid", Grid)
def test_extremes_are_given_up_for_the_rest_of_their_group(grid) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    plain = squared_error(quantize(weight, 4, 64, grid).dequantize(), weight)
    searched = quantize_clipped(weight, Rounding(4, 64, grid)).dequantize()
    assert squared_error(searched, weight) < 0.95 * plain
    assert searched.max() < weight.max()


@pytest.mark.parametrize("with_gram", [False, True])
def test_a_matrix_that_lies_on_a_grid_with_minima_is_recovered_exactly(with_gram) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    inputs = loud_inputs(300, 256)
    gram = inputs.T @ inputs / 300 if with_gram else None
    searched = quantize_clipped(stored, Rounding(4, 32, Grid.FLOAT_MINIMUM), gram)
    np.testing.assert_array_equal(searched.dequantize(), stored)


@pytest.mark.parametrize("grid", Grid)
def test_equal_weights_and_zeros_keep_their_value_as_far_as_float16_scales_can_say_it(grid) -> None:
    assert not quantize_clipped(np.zeros((2, 64), np.float32), Rounding(4, 32, grid)).dequantize().any()
    same = np.full((2, 64), 0.75, np.float32)
    np.testing.assert_allclose(quantize_clipped(same, Rounding(4, 32, grid)).dequantize(), same, rtol=2**-11)


@pytest.mark.parametrize("grid", Grid)
def test_with_a_gram_the_search_minimizes_what_the_text_makes_of_an_error(grid) -> None:
    weight = np.random.default_rng(2).standard_normal((96, 64)).astype(np.float32)
    inputs = loud_inputs(400, 64)
    gram = inputs.T @ inputs / 400
    rounding = Rounding(4, 64, grid)

    def error(rounded: np.ndarray) -> float:
        return float(np.sum((rounded - weight) @ with_common_part(gram) * (rounded - weight)))

    blind = error(quantize_clipped(weight, rounding).dequantize())
    assert error(quantize_clipped(weight, rounding, gram).dequantize()) < 0.95 * blind


def test_a_longer_ladder_is_never_worse() -> None:
    weight = np.random.default_rng(3).standard_normal((64, 128)).astype(np.float32)
    rounding = Rounding(4, 64, Grid.SYMMETRIC)
    errors = [
        squared_error(quantize_clipped(weight, rounding, ladder=LADDER[:rungs]).dequantize(), weight)
        for rungs in (1, 4, len(LADDER))
    ]
    assert errors == sorted(errors, reverse=True)


def test_rounding_to_nearest_takes_another_grid_where_the_last_group_is_not_full() -> None:
    architecture = plain_architecture(ffn_size=80)
    weights = random_layer(architecture)
    rounded = RoundToNearest(Rounding(4, 32, Grid.FLOAT_MINIMUM)).quantize(architecture, 0, weights, None)
    assert rounded.linears["mlp.gate_proj"].minima is not None
    assert rounded.linears["mlp.down_proj"].zero_points is not None
    assert rounded.linears["mlp.down_proj"].minima is None
