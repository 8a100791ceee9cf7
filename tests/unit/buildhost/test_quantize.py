"""Rounding: what each grid promises, for any matrix."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgellm_buildhost.graph.minima import extra_columns, fold_minima, sum_columns
from edgellm_buildhost.quantization.fp8 import to_fp8
from edgellm_buildhost.quantization.grid import (
    Grid,
    Rounding,
    concatenate,
    pack_codes,
    quantize,
)
from edgellm_buildhost.quantization.layer import Int8Tensor, Linear
from edgellm_buildhost.quantization.rows import concatenate_linears, take_rows

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
    assert folded.columns == plain.columns + extra_columns(plain.columns, plain.group_size)
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
    packed = pack_codes(codes, 4)
    unpacked = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(codes), -1)
    np.testing.assert_array_equal(unpacked[:, : codes.shape[1]], codes)
    np.testing.assert_array_equal(pack_codes(codes, 8), codes)


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


@given(MATRICES, BITS)
def test_symmetric_scales_are_positive_as_every_loader_takes_them(matrix, bits) -> None:
    assert (quantize(matrix, bits, 16, Grid.SYMMETRIC).scales >= 0).all()


def in_every_form(rows: int = 6) -> dict[str, Linear]:
    weight = np.random.default_rng(4).standard_normal((rows, 64)).astype(np.float32)
    steps = np.abs(weight).max(axis=1) / np.float32(127)
    forms: dict[str, Linear] = {grid.value: quantize(weight, 4, 32, grid) for grid in Grid}
    forms["int8"] = Int8Tensor(np.rint(weight / steps[:, None]).astype(np.int8), steps, 0.5)
    forms["fp8"] = to_fp8(weight, 0.5)
    forms["floats"] = weight
    return forms


def floats(linear: Linear) -> np.ndarray:
    return linear if isinstance(linear, np.ndarray) else linear.dequantize()


@pytest.mark.parametrize("form", in_every_form())
@pytest.mark.parametrize("order", [slice(1, 4), [5, 0, 2], np.array([3, 3])])
def test_rows_of_any_form_are_taken_as_they_are(form, order) -> None:
    linear = in_every_form()[form]
    np.testing.assert_array_equal(floats(take_rows(linear, order)), floats(linear)[order])


@pytest.mark.parametrize("form", in_every_form())
def test_rows_of_any_form_are_put_together_again(form) -> None:
    linear = in_every_form()[form]
    joined = concatenate_linears([take_rows(linear, slice(0, 2)), take_rows(linear, slice(2, 6))])
    np.testing.assert_array_equal(floats(joined), floats(linear))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "no linear maps"),
        (["int8", "floats"], "different forms cannot be joined: Int8Tensor, ndarray"),
        (["symmetric", "integer zero"], "different grids"),
    ],
)
def test_linear_maps_of_different_forms_are_not_joined(parts, told) -> None:
    with pytest.raises(ValueError, match=told):
        concatenate_linears([in_every_form()[form] for form in parts])


def test_matrices_that_share_a_product_must_share_its_scales() -> None:
    int8, fp8 = in_every_form()["int8"], in_every_form()["fp8"]
    with pytest.raises(ValueError, match="input scales"):
        concatenate_linears([int8, replace(int8, input_scale=0.25)])
    with pytest.raises(ValueError, match="different scales"):
        concatenate_linears([fp8, replace(fp8, scale=0.25)])


@pytest.mark.parametrize("size", [0, 8, 48, 512])
def test_group_sizes_that_no_kernel_takes_are_refused(size) -> None:
    with pytest.raises(ValueError, match=f"group size {size}"):
        quantize(np.ones((2, 64), np.float32), 4, size, Grid.SYMMETRIC)
    with pytest.raises(ValueError, match=f"group size {size}"):
        Rounding(4, size, Grid.SYMMETRIC)
