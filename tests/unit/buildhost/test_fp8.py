"""FP8: scales that use the whole range of E4M3, and never leave it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgellm_buildhost.architecture import KEY, QUERY, VALUE
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.fp8 import LARGEST, Fp8, to_fp8
from edgellm_buildhost.quantization.layer import READERS, FloatLayer, Fp8Tensor
from edgellm_buildhost.quantization.rows import concatenate_linears
from tests.support.random_layers import plain_architecture, random_layer, random_statistics

VALUES = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=VALUES))
def test_a_weight_moves_by_at_most_a_sixteenth_of_itself_or_a_last_step(matrix) -> None:
    rounded = to_fp8(matrix, 1.0)
    result = rounded.dequantize()
    # Three bits of mantissa; below 2^-6 the steps stay at 2^-9.
    allowed = np.maximum(np.abs(matrix) / 16, rounded.scale * 2.0**-10) * 1.001
    assert (np.abs(result - matrix) <= allowed).all()


def test_the_largest_weight_and_input_of_a_point_use_the_largest_value() -> None:
    architecture = plain_architecture()
    weights = random_layer(architecture)
    statistics = random_statistics(architecture, weights)
    rounded = Fp8().quantize(architecture, 0, weights, statistics)
    for point, parts in READERS.items():
        linears = [rounded.linears[part] for part in parts]
        joined = concatenate_linears(linears)  # as some families store them: one tensor has one scale
        assert isinstance(joined, Fp8Tensor)
        assert np.abs(joined.values.astype(np.float32)).max() == LARGEST
        assert joined.input_scale * LARGEST == pytest.approx(statistics[point].max_abs.max())
    assert rounded.vectors is weights.vectors


def test_a_small_matrix_beside_a_large_one_keeps_its_precision() -> None:
    architecture = plain_architecture()
    plain = random_layer(architecture)
    small = plain.linears[KEY] * np.float32(1e-3)
    weights = FloatLayer({**plain.linears, KEY: small}, plain.vectors)
    statistics = random_statistics(architecture, weights)
    linear = Fp8().quantize(architecture, 0, weights, statistics).linears[KEY]
    assert isinstance(linear, Fp8Tensor)
    # A sixteenth of a weight, or half of the last step, 2^-9.
    assert (np.abs(linear.dequantize() - small) <= np.maximum(np.abs(small) / 16, linear.scale / 1023)).all()


def test_a_matrix_of_zeros_leaves_the_scale_of_its_neighbours_alone() -> None:
    architecture = plain_architecture()
    plain = random_layer(architecture)
    weights = FloatLayer({**plain.linears, KEY: np.zeros_like(plain.linears[KEY])}, plain.vectors)
    statistics = random_statistics(architecture, weights)
    linear = Fp8().quantize(architecture, 0, weights, statistics).linears[QUERY]
    assert isinstance(linear, Fp8Tensor)
    largest = max(np.abs(plain.linears[part]).max() for part in (QUERY, VALUE))
    assert linear.scale * LARGEST == pytest.approx(largest)


def test_zeros_stay_zeros() -> None:
    assert not to_fp8(np.zeros((2, 8), np.float32), 1.0).dequantize().any()


def test_missing_statistics_are_one_clear_error() -> None:
    architecture = plain_architecture()
    with pytest.raises(BuildError, match="needs statistics"):
        Fp8().quantize(architecture, 0, random_layer(architecture), None)
