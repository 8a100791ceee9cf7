"""Quantized checkpoints of others are taken as they are: each weight is the one that was stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgellm_buildhost.architecture import DOWN, GATE, KEY, LINEARS, OUTPUT, QUERY, UP, VALUE
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantized import KvCacheScales, is_quantized, open_quantized
from edgellm_buildhost.quantized.layout import cut_groups
from edgellm_buildhost.quantized.packed import AWQ_ORDER, unpack_first, unpack_last
from tests.support.tiny_families import write_family
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.published_layouts import (
    AWQ,
    GPTQ,
    LAYOUTS,
    awq_tensors,
    compressed_tensors,
    gptq_tensors,
    made_of,
    pack,
    with_weights,
)
from tests.unit.buildhost.quantized_layers import floats, int8_products, symmetric, write


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_weights_of_another_layout_are_read_exactly(name: str, tmp_path: Path) -> None:
    directory, modules = made_of(tmp_path / "tiny", *LAYOUTS[name])
    assert is_quantized(directory)
    read = open_quantized(directory)
    for index in range(2):
        for part in LINEARS:
            found = read.linear(index, part)
            assert isinstance(found, QuantizedTensor)
            expected = modules[f"model.layers.{index}.{part}"]
            np.testing.assert_array_equal(found.zero_points, expected.zeros)
            np.testing.assert_array_equal(found.dequantize(), expected.weight())
    assert name.split(maxsplit=1)[0] in read.scheme
    assert read.tokenizer == open_checkpoint(make_tiny_hf(tmp_path / "float")).tokenizer


def test_zero_points_at_half_of_the_range_are_a_symmetric_grid(tmp_path: Path) -> None:
    directory, modules = made_of(tmp_path / "tiny", GPTQ | {"sym": True}, gptq_tensors, zero=8)
    found = open_quantized(directory).linear(0, DOWN)
    assert isinstance(found, QuantizedTensor)
    assert found.zero_points is None
    np.testing.assert_array_equal(found.dequantize(), modules[f"model.layers.0.{DOWN}"].weight())


def test_a_grid_is_symmetric_by_the_configuration_and_not_by_chance(tmp_path: Path) -> None:
    directory, modules = made_of(tmp_path / "tiny", GPTQ, gptq_tensors, zero=8)
    found = open_quantized(directory).linear(0, KEY)
    assert isinstance(found, QuantizedTensor)
    assert found.zero_points is not None  # those of query and value may differ: they are one product
    np.testing.assert_array_equal(found.dequantize(), modules[f"model.layers.0.{KEY}"].weight())


def test_a_symmetric_grid_without_zero_points_is_read(tmp_path: Path) -> None:
    config = with_weights(symmetric=True)
    directory, modules = made_of(
        tmp_path / "tiny", config, lambda matrix: compressed_tensors(matrix, symmetric=True), zero=8
    )
    found = open_quantized(directory).linear(0, KEY)
    assert isinstance(found, QuantizedTensor)
    assert found.zero_points is None
    np.testing.assert_array_equal(found.dequantize(), modules[f"model.layers.0.{KEY}"].weight())


def test_eight_bit_gptq_is_read(tmp_path: Path) -> None:
    directory, modules = made_of(
        tmp_path / "tiny", GPTQ | {"bits": 8}, lambda matrix: gptq_tensors(matrix, bits=8), bits=8
    )
    np.testing.assert_array_equal(
        floats(open_quantized(directory).linear(1, UP)), modules[f"model.layers.1.{UP}"].weight()
    )


def test_one_scale_for_a_whole_row_is_cut_into_groups_that_kernels_have(tmp_path: Path) -> None:
    directory, modules = made_of(tmp_path / "tiny", GPTQ | {"group_size": -1}, gptq_tensors, group_size=None)
    found = open_quantized(directory).linear(0, DOWN)
    assert isinstance(found, QuantizedTensor)
    assert found.group_size == 128
    np.testing.assert_array_equal(found.dequantize(), modules[f"model.layers.0.{DOWN}"].weight())


@given(st.integers(1, 40).map(lambda sixteens: 16 * sixteens), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_groups_that_are_cut_stand_for_the_same_weights(size: int, groups: int, seed: int) -> None:
    matrix = any_matrix(size, groups, seed)
    cut = cut_groups(matrix, "a matrix")
    assert cut.group_size in {16, 32, 64, 128, 256}
    np.testing.assert_array_equal(cut.dequantize(), matrix.dequantize())


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_a_row_with_one_scale_is_filled_up_to_whole_groups(columns: int, seed: int) -> None:
    row = any_matrix(columns, 1, seed)
    cut = cut_groups(row, "a matrix")
    assert cut.group_size in {16, 32, 64, 128, 256}
    np.testing.assert_array_equal(cut.dequantize(), row.dequantize())


@given(st.integers(1, 300).filter(lambda size: size % 16), st.integers(2, 5))
def test_several_groups_that_no_kernel_has_are_refused(size: int, groups: int) -> None:
    with pytest.raises(BuildError, match=rf"^a matrix has groups of {size} inputs") as caught:
        cut_groups(any_matrix(size, groups, 0), "a matrix")
    assert "float checkpoint" in caught.value.hint


def any_matrix(size: int, groups: int, seed: int) -> QuantizedTensor:
    """Two rows of codes and zero points of 8 bits."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (2, groups, size), np.uint8)
    scales = rng.uniform(0.1, 1, (2, groups)).astype(np.float32)
    return QuantizedTensor(8, groups * size, codes, scales, rng.integers(0, 256, (2, groups), np.uint8))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_words_unpack_to_the_integers_that_were_packed(rows: int, words: int, bits: Any, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, words * 32 // bits))
    np.testing.assert_array_equal(unpack_last(pack(values, bits), bits), values)
    np.testing.assert_array_equal(unpack_first(np.ascontiguousarray(pack(values, bits).T), bits), values.T)
    if bits == 4:
        np.testing.assert_array_equal(unpack_last(pack(values, 4, AWQ_ORDER), 4, AWQ_ORDER), values)


def test_linears_that_were_left_unquantized_are_floats(tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "tiny", AWQ, awq_tensors)
    weight = np.full((64, 128), 0.5, np.float16)
    path = directory / "model.safetensors"
    tensors = {
        name: value
        for name, value in load_file(path).items()
        if not name.startswith(f"model.layers.1.{DOWN}")
    }
    save_file(tensors | {f"model.layers.1.{DOWN}.weight": weight}, path)
    np.testing.assert_array_equal(open_quantized(directory).linear(1, DOWN), weight)


# Scales that ModelOpt leaves beside a linear, to be multiplied into its inputs


def smoothed(directory: Path, **factors: NDArray[np.float32]) -> Path:
    """Give linears of layer 0 a `pre_quant_scale`."""
    shard = directory / "model-00001-of-00003.safetensors"
    added = {f"model.layers.0.{part}.pre_quant_scale": values for part, values in factors.items()}
    save_file(load_file(shard) | added, shard)
    index = directory / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    weights["weight_map"] |= dict.fromkeys(added, shard.name)
    index.write_text(json.dumps(weights))
    return directory


def some_factors(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0.5, 2, count).astype(np.float16).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "tiny")


@pytest.mark.parametrize("form", [symmetric(4), int8_products], ids=["int4", "int8"])
def test_factors_before_down_proj_go_into_the_rows_of_up_proj(
    form: Any, source: Path, tmp_path: Path
) -> None:
    plain = open_quantized(write(tmp_path / "plain", source, form))
    factors = some_factors(128)
    read = open_quantized(smoothed(write(tmp_path / "out", source, form), **{DOWN: factors}))
    expected = floats(plain.linear(0, UP)) * factors[:, None]
    np.testing.assert_allclose(floats(read.linear(0, UP)), expected, rtol=1e-6)
    np.testing.assert_array_equal(floats(read.linear(0, DOWN)), floats(plain.linear(0, DOWN)))
    assert type(read.linear(0, UP)) is type(plain.linear(0, UP))


def test_factors_before_o_proj_go_into_v_proj_where_the_heads_agree(source: Path, tmp_path: Path) -> None:
    plain = open_quantized(write(tmp_path / "plain", source, symmetric(4)))
    by_channel = some_factors(32).reshape(2, 1, 16)
    for_queries = np.repeat(by_channel, 2, axis=1).reshape(-1)
    read = open_quantized(smoothed(write(tmp_path / "out", source, symmetric(4)), **{OUTPUT: for_queries}))
    expected = floats(plain.linear(0, VALUE)) * by_channel.reshape(-1)[:, None]
    np.testing.assert_allclose(floats(read.linear(0, VALUE)), expected, rtol=1e-6)
    np.testing.assert_array_equal(floats(read.linear(0, OUTPUT)), floats(plain.linear(0, OUTPUT)))


def test_factors_that_have_no_place_make_o_proj_floats(source: Path, tmp_path: Path) -> None:
    plain = open_quantized(write(tmp_path / "plain", source, symmetric(4)))
    factors = some_factors(64)
    read = open_quantized(smoothed(write(tmp_path / "out", source, symmetric(4)), **{OUTPUT: factors}))
    found = read.linear(0, OUTPUT)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, floats(plain.linear(0, OUTPUT)) * factors, rtol=1e-6)
    np.testing.assert_array_equal(floats(read.linear(0, VALUE)), floats(plain.linear(0, VALUE)))


def test_factors_behind_a_norm_go_into_its_gain(source: Path, tmp_path: Path) -> None:
    plain = open_quantized(write(tmp_path / "plain", source, int8_products))
    factors = some_factors(64)
    shared = dict.fromkeys((QUERY, KEY, VALUE), factors)
    read = open_quantized(smoothed(write(tmp_path / "out", source, int8_products), **shared))
    name = "model.layers.0.input_layernorm.weight"
    np.testing.assert_allclose(read.vector(name), plain.vector(name) * factors, rtol=1e-6)
    np.testing.assert_array_equal(floats(read.linear(0, QUERY)), floats(plain.linear(0, QUERY)))
    other = "model.layers.1.input_layernorm.weight"
    np.testing.assert_array_equal(read.vector(other), plain.vector(other))


def test_readers_that_disagree_keep_their_factors(source: Path, tmp_path: Path) -> None:
    plain = open_quantized(write(tmp_path / "plain", source, symmetric(4)))
    gate, up = some_factors(64, 1), some_factors(64, 2)
    read = open_quantized(smoothed(write(tmp_path / "out", source, symmetric(4)), **{GATE: gate, UP: up}))
    name = "model.layers.0.post_attention_layernorm.weight"
    np.testing.assert_array_equal(read.vector(name), plain.vector(name))
    np.testing.assert_allclose(floats(read.linear(0, GATE)), floats(plain.linear(0, GATE)) * gate, rtol=1e-6)
    np.testing.assert_allclose(floats(read.linear(0, UP)), floats(plain.linear(0, UP)) * up, rtol=1e-6)


# Tensors without a use here


def test_biases_of_zeros_are_read_past(tmp_path: Path) -> None:
    directory, modules = made_of(tmp_path / "tiny", GPTQ, gptq_tensors)
    path = directory / "model.safetensors"
    biases = {f"{module}.bias": np.zeros(32, np.float16) for module in modules}
    save_file(load_file(path) | biases, path)
    np.testing.assert_array_equal(
        floats(open_quantized(directory).linear(0, UP)), modules[f"model.layers.0.{UP}"].weight()
    )


@pytest.mark.parametrize("family", ["llama2", "phi3"])
def test_scales_of_a_kv_cache_are_read_past(family: str, tmp_path: Path) -> None:
    source = write_family(tmp_path / "float", family)
    scales = KvCacheScales("FP8", [0.5, 0.25], [2, 4])
    with_scales = open_quantized(write(tmp_path / "scales", source, symmetric(4), kv_scales=scales))
    without = open_quantized(write(tmp_path / "none", source, symmetric(4)))
    np.testing.assert_array_equal(floats(with_scales.linear(1, KEY)), floats(without.linear(1, KEY)))
