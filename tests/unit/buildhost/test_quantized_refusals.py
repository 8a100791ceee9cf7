"""Quantized checkpoints that cannot be taken are refused, with the name of what is wrong in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgellm_buildhost.architecture import DOWN, GATE, LINEARS, QUERY
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantized import is_quantized, open_quantized
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.published_layouts import (
    AWQ,
    COMPRESSED,
    GPTQ,
    LAYOUTS,
    WEIGHTS,
    awq_tensors,
    compressed_tensors,
    edit,
    gptq_tensors,
    made_of,
    with_weights,
)
from tests.unit.buildhost.quantized_layers import symmetric, write

LAYER = "model.layers.0"
QUERY_MODULE = f"{LAYER}.{QUERY}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"quantization_config\.quant_method 'bitsandbytes' is not read"),
        (AWQ | {"version": "gemv"}, r"version 'gemv'"),
        (AWQ | {"bits": 3}, r"bits 3"),
        (GPTQ | {"bits": 3}, r"bits 3"),
        (GPTQ | {"dynamic": {"x": {}}}, r"dynamic"),
        (GPTQ | {"group_size": 48}, r"group_size 48 does not divide the 64 inputs of model\.layers\.0"),
        (COMPRESSED | {"format": "float-quantized"}, r"format 'float-quantized'"),
        (COMPRESSED | {"config_groups": {}}, r"config_groups"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"quant_algo 'NVFP4' is not read"),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}},
            r"quantized_layers",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_not_read_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "tiny", config, gptq_tensors)
    with pytest.raises(BuildError, match=message) as caught:
        open_quantized(directory).linear(0, QUERY)
    assert caught.value.hint


def test_inputs_in_activation_order_are_refused(tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "tiny", GPTQ | {"desc_act": True}, gptq_tensors)
    open_quantized(directory).linear(0, QUERY)  # in order, whatever the configuration says
    edit(
        directory,
        **{f"model__layers__0__{QUERY}__g_idx".replace(".", "__"): np.arange(64, dtype=np.int32)[::-1] // 32},
    )
    with pytest.raises(BuildError, match=r"q_proj\.g_idx puts inputs into groups by activation order"):
        open_quantized(directory).linear(0, QUERY)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("qweight", np.zeros((8, 64), np.int64), r"type I64, it should be I32"),
        ("qweight", np.zeros((4, 64), np.int32), r"has shape \[4, 64\], the configuration says \[8, 64\]"),
        ("scales", np.full((2, 64), np.nan, np.float16), r"128 values that are not finite"),
        ("scales", None, r"no tensor model\.layers\.0\.self_attn\.q_proj\.scales"),
        ("qweight", None, r"neither model\.layers\.0\.self_attn\.q_proj\.qweight nor"),
    ],
    ids=["type", "shape", "finite", "scales missing", "weights missing"],
)
def test_a_damaged_tensor_is_named_with_its_file(
    tensor: str, value: Any, message: str, tmp_path: Path
) -> None:
    directory, _ = made_of(tmp_path / "tiny", GPTQ, gptq_tensors)
    edit(directory, **{f"model__layers__0__self_attn__q_proj__{tensor}": value})
    with pytest.raises(BuildError, match=message) as caught:
        open_quantized(directory).linear(0, QUERY)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("cut", [None, 100], ids=["missing", "cut short"])
def test_a_shard_that_is_not_whole_is_named(cut: int | None, source: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "out", source, symmetric(4))
    shard = directory / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if cut is not None:
        shard.write_bytes(data[:-cut])
    with pytest.raises(BuildError, match=r"model-00002-of-00003\.safetensors"):
        open_quantized(directory)


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "tiny", AWQ, awq_tensors)
    path = directory / "model.safetensors"
    save_file(load_file(path) | {"model.embed_tokens.qweight": np.zeros((64, 37), np.int32)}, path)
    with pytest.raises(BuildError, match=r"model\.embed_tokens is quantized"):
        open_quantized(directory)


def test_a_float_checkpoint_is_not_taken_for_a_quantized_one(source: Path) -> None:
    assert not is_quantized(source)
    with pytest.raises(BuildError, match="not quantized"):
        open_quantized(source)


# Tensors that nobody here knows


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{QUERY_MODULE}.bias", np.full(64, 9, np.float16)),
        (f"{LAYER}.self_attn.q_norm.weight", np.full(16, 3, np.float16)),
        (f"{LAYER}.mlp.experts.0.up_proj.qweight", np.zeros((64, 16), np.int32)),
        (f"{QUERY_MODULE}.g_idx", np.zeros(64, np.int32)),
        ("model.layers.2.input_layernorm.weight", np.ones(64, np.float16)),
    ],
    ids=["a bias", "a norm of heads", "an expert", "another layout's part", "one more layer"],
)
def test_a_tensor_that_would_be_lost_is_named(name: str, value: NDArray[Any], tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "tiny", AWQ, awq_tensors)
    path = directory / "model.safetensors"
    save_file(load_file(path) | {name: value}, path)
    with pytest.raises(BuildError, match=rf"there is a tensor {name.replace('.', chr(92) + '.')}, which"):
        open_quantized(directory)


def test_zero_points_of_a_grid_that_is_called_symmetric_are_refused(tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "gptq", GPTQ | {"sym": True}, gptq_tensors)
    with pytest.raises(BuildError, match=r"q_proj\.qzeros has zero points other than 8, but sym is true"):
        open_quantized(directory).linear(0, QUERY)
    directory, _ = made_of(tmp_path / "compressed", with_weights(symmetric=True), compressed_tensors)
    with pytest.raises(BuildError, match=r"there is a tensor model\.layers\.0\.\S*\.weight_zero_point"):
        open_quantized(directory)


# Sizes that do not go together


def test_groups_that_no_kernel_has_are_refused(tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "tiny", GPTQ | {"group_size": 8}, gptq_tensors, group_size=8)
    with pytest.raises(BuildError, match=r"down_proj has groups of 8 inputs") as caught:
        open_quantized(directory).linear(0, DOWN)
    assert "float checkpoint" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "maker", "part"),
    [
        (AWQ, awq_tensors, GATE),
        (GPTQ, gptq_tensors, GATE),
        (GPTQ | {"group_size": None}, gptq_tensors, DOWN),
    ],
    ids=["outputs of awq", "outputs of gptq", "inputs of gptq"],
)
def test_a_width_that_does_not_fill_its_words_is_refused(
    config: dict[str, Any], maker: Callable[..., Any], part: str, tmp_path: Path
) -> None:
    directory, _ = made_of(tmp_path / "tiny", config, maker, ffn=100, group_size=config["group_size"])
    with pytest.raises(BuildError, match=rf"{part} is 100 wide, and a word holds 8 integers of 4 bits"):
        open_quantized(directory).linear(0, part)


def test_rows_that_do_not_fill_their_bytes_are_refused(source: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "out", source, symmetric(4))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 127}))
    with pytest.raises(BuildError, match=r"gate_proj has 127 output rows, and a byte holds two"):
        open_quantized(directory).linear(0, GATE)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(
            ("weight_scale", np.ones(shape, np.float32))
            for shape in [(64,), (64, 3), (64, 0), (64, 5), (64, 128), (0, 0), (64, 2, 1), ()]
        ),
        *(("weight", np.ones(shape, np.int8)) for shape in [(64,), (), (64, 2, 32, 1), (64, 1, 48)]),
        *(("weight", np.ones(shape, np.uint8)) for shape in [(32,), (), (31, 64), (32, 0)]),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype}{value.shape}",
)
def test_shapes_that_are_no_linear_are_named(
    part: str, value: NDArray[Any], source: Path, tmp_path: Path
) -> None:
    directory = write(tmp_path / "out", source, symmetric(4))
    edit(directory, **{f"{QUERY_MODULE}.{part}".replace(".", "__"): value})
    with pytest.raises(BuildError, match=r"q_proj\.weight"):
        open_quantized(directory).linear(0, QUERY)


def test_groups_that_leave_out_a_part_of_the_row_are_refused(source: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "out", source, symmetric(8))
    module = QUERY_MODULE.replace(".", "__")
    shapes = {"weight": np.ones((64, 1, 48), np.int8), "weight_scale": np.ones((64, 1), np.float32)}
    edit(directory, **{f"{module}__{part}": value for part, value in shapes.items()})
    with pytest.raises(
        BuildError, match=r"q_proj\.weight_scale has shape \[64, 1\], which does not divide 64"
    ):
        open_quantized(directory).linear(0, QUERY)


# Configurations by hand


HOSTILE: list[Any] = [[], {}, [1], "x", -5, 0, 1e9, True, 2.5, {"a": 1}]


def complaint(directory: Path) -> str | None:
    """What is said of the first layer, None if it is read; any error but one for the user goes through."""
    try:
        read = open_quantized(directory)
        for part in LINEARS:
            read.linear(0, part)
        for name in read.architecture.vectors():
            read.vector(f"{LAYER}.{name}")
    except BuildError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_value_of_a_field_is_an_error_of_the_program(name: str, tmp_path: Path) -> None:
    config, maker = LAYOUTS[name]
    directory, _ = made_of(tmp_path / "tiny", config, maker)
    configs = [config | {field: value} for field in config for value in HOSTILE]
    if config is COMPRESSED:
        configs += [with_weights(**{field: value}) for field in WEIGHTS for value in HOSTILE]
        groups = [{"g": value} for value in HOSTILE] + [{"g": {"weights": value}} for value in HOSTILE]
        configs += [config | {"config_groups": group} for group in groups]
    settings = json.loads((directory / "config.json").read_text())
    for changed in configs:
        (directory / "config.json").write_text(json.dumps(settings | {"quantization_config": changed}))
        said = complaint(directory)
        assert said is None or "config.json: quantization_config" in said or LAYER in said


def test_no_value_of_a_field_of_modelopt_is_an_error_of_the_program(source: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "out", source, symmetric(4))
    path = directory / "hf_quant_config.json"
    good: dict[str, Any] = json.loads(path.read_text())["quantization"]
    mixed = good | {"quant_algo": "MIXED_PRECISION"}
    changed: list[Any] = [*HOSTILE, *(good | {field: value} for field in good for value in HOSTILE)]
    changed += [mixed | {"quantized_layers": value} for value in HOSTILE]
    changed += [mixed | {"quantized_layers": {"a": {"quant_algo": value}}} for value in HOSTILE]
    for quantization in changed:
        path.write_text(json.dumps({"quantization": quantization}))
        said = complaint(directory)
        assert said is None or "hf_quant_config.json: quantization" in said
