"""Rounding: what each grid promises, for any matrix."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgellm_buildhost.minima import extra_columns, fold_minima, sum_columns
from edgellm_buildhost.quantize import Grid, concatenate, pack_codes, quantize, unpack_codes

VALUES = st.floats(-100, 100, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 130)), elements=VALUES)
BITS = st.sampled_from([4, 8])
GROUP_SIZES = st.sampled_from([16, 32, 64])


@given(MATRICES, BITS, GROUP_SIZES, st.sampled_from(list(Grid)))
def test_no_weight_moves_further_than_its_grid_allows(matrix, bits, group_size, grid) -> None:
    rounded = quantize(matrix, bits, group_size, grid)
    result = rounded.dequantize()
    assert result.shape == matrix.shape
    # Half a step; the symmetric grid lacks the topmost level, and an integer zero is rounded itself.
    steps = {Grid.FLOAT_MINIMUM: 0.5, Grid.INTEGER_ZERO: 1.0, Grid.SYMMETRIC: 1.0}[grid]
    step = np.repeat(np.abs(rounded.scales), group_size, axis=1)[:, : matrix.shape[1]]
    assert (np.abs(result - matrix) <= steps * step * 1.001 + 1e-4).all()


@given(MATRICES, BITS, GROUP_SIZES)
def test_rounding_twice_changes_nothing_on_the_grid_with_a_minimum(matrix, bits, group_size) -> None:
    once = quantize(matrix, bits, group_size, Grid.FLOAT_MINIMUM).dequantize()
    twice = quantize(once, bits, group_size, Grid.FLOAT_MINIMUM).dequantize()
    np.testing.assert_allclose(twice, once, atol=1e-5 * max(1.0, np.abs(matrix).max()))


def test_weights_which_lie_on_the_grid_of_q4_1_are_recovered_exactly() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    np.testing.assert_array_equal(quantize(stored, 4, 32, Grid.FLOAT_MINIMUM).dequantize(), stored)


@given(MATRICES.filter(lambda matrix: matrix.shape[1] >= 32), BITS, st.integers(0, 2**31))
@settings(deadline=None)
def test_folded_minima_stand_for_the_same_product(matrix, bits, seed) -> None:
    matrix = matrix[:, : matrix.shape[1] // 32 * 32]
    plain = quantize(matrix, bits, 32, Grid.FLOAT_MINIMUM)
    folded = fold_minima(plain)
    assert folded.minima is None
    assert folded.columns == plain.columns + extra_columns(plain)
    x = np.random.default_rng(seed).standard_normal(plain.columns).astype(np.float32)
    sums = x @ sum_columns(plain)
    result = folded.dequantize() @ np.concatenate([x, sums])
    # The rest of a row is rounded in groups of 32 by its own largest rest.
    largest_rest = np.abs(folded.dequantize()[:, plain.columns :]).max(initial=0.0)
    allowed = largest_rest / (1 << (bits - 1)) * np.abs(sums).sum()
    np.testing.assert_allclose(result, plain.dequantize() @ x, atol=float(allowed) + 1e-2)


def test_folding_keeps_weights_to_a_fifteenth_of_a_step() -> None:
    weight = np.random.default_rng(2).standard_normal((128, 576)).astype(np.float32)
    plain = quantize(weight, 4, 32, Grid.FLOAT_MINIMUM)
    folded = fold_minima(plain).dequantize()
    result = folded[:, :576] + np.repeat(folded[:, 576 : 576 + 18], 32, axis=1)
    assert np.abs(result - plain.dequantize()).max() < plain.scales.max() / 15


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 33)), elements=st.integers(0, 15)))
def test_packed_codes_unpack_to_themselves(codes) -> None:
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 4), 4, codes.shape[1]), codes)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 8), 8, codes.shape[1]), codes)


@pytest.mark.parametrize("grid", Grid)
def test_joined_matrices_keep_their_rows(grid) -> None:
    rng = np.random.default_rng(3)
    parts = [quantize(rng.standard_normal((rows, 64)).astype(np.float32), 4, 32, grid) for rows in (3, 5)]
    expected = np.concatenate([part.dequantize() for part in parts])
    np.testing.assert_array_equal(concatenate(parts).dequantize(), expected)


def test_matrices_on_different_grids_are_not_joined() -> None:
    matrix = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match="different grids"):
        concatenate([quantize(matrix, 4, 32, Grid.SYMMETRIC), quantize(matrix, 4, 32, Grid.INTEGER_ZERO)])


@pytest.mark.parametrize("grid", Grid)
def test_a_matrix_of_zeros_stays_zero(grid) -> None:
    assert not quantize(np.zeros((2, 64), np.float32), 4, 32, grid).dequantize().any()
