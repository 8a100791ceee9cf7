"""Quantized checkpoints: what was written is read back, and a build that was cut off goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edgellm_buildhost.architecture import DOWN, EMBEDDING, FINAL_NORM, HEAD, LINEARS, QUERY, layer_tensor
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.checkpoint.tensor_files import read_header
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantization.layer import Linear, QuantizedLayer
from edgellm_buildhost.quantized import CheckpointWriter, KvCacheScales, is_quantized, open_quantized
from edgellm_buildhost.quantized.forms import pack_rows, unpack_rows
from edgellm_buildhost.quantized.tensor_writer import Pending, write_tensors
from tests.support.small_disk import run_on, small_disk
from tests.support.tiny_models import make_tiny_gguf, make_tiny_hf
from tests.unit.buildhost.quantized_layers import FORMS, floats, int8_products, layer_of, symmetric, write

ROOT = Path(__file__).parents[3]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "tiny", dtype="float16")


def quantization(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]
    return found


def all_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_linear_is_read_back_exactly(name: str, source: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "out", source, FORMS[name])
    checkpoint, read = open_checkpoint(source), open_quantized(directory)
    for index in range(checkpoint.architecture.layers):
        expected = layer_of(checkpoint, index, FORMS[name])
        for part in LINEARS:
            written, found = expected.linears[part], read.linear(index, part)
            assert type(found) is type(written)
            np.testing.assert_array_equal(floats(found), floats(written))
            if not isinstance(written, (np.ndarray, QuantizedTensor)):
                assert not isinstance(found, (np.ndarray, QuantizedTensor))
                assert found.input_scale == written.input_scale
        for part, values in expected.vectors.items():
            np.testing.assert_array_equal(read.vector(f"model.layers.{index}.{part}"), values)
    np.testing.assert_array_equal(read.vector(FINAL_NORM), checkpoint.tensor(FINAL_NORM))
    np.testing.assert_array_equal(read.rows(EMBEDDING, 7, 20), checkpoint.rows(EMBEDDING, 7, 20))
    assert read.architecture == checkpoint.architecture
    assert read.tokenizer == checkpoint.tokenizer
    assert read.scheme == "as the test says"
    assert is_quantized(directory)
    assert not is_quantized(source)


def test_codes_and_groups_come_back_as_they_were(source: Path, tmp_path: Path) -> None:
    written = layer_of(open_checkpoint(source), 1, symmetric(4)).linears[QUERY]
    found = open_quantized(write(tmp_path / "out", source, symmetric(4))).linear(1, QUERY)
    assert isinstance(written, QuantizedTensor)
    assert isinstance(found, QuantizedTensor)
    np.testing.assert_array_equal(found.codes, written.codes)
    np.testing.assert_array_equal(found.scales, written.scales)


def test_four_bit_weights_are_stored_as_modelopt_stores_them(source: Path, tmp_path: Path) -> None:
    directory = write(tmp_path / "out", source, symmetric(4))
    name = layer_tensor(0, DOWN)
    tensors = load_file(directory / "model-00001-of-00003.safetensors")
    weight, scales = tensors[name], tensors[f"{name}_scale"]
    assert (weight.dtype.name, weight.shape) == ("uint8", (32, 128))
    assert (scales.dtype.name, scales.shape) == ("float32", (64, 4))
    expected = floats(layer_of(open_checkpoint(source), 0, symmetric(4)).linears[DOWN])
    for row in (0, 1, 62, 63):
        nibbles = (weight[row // 2] >> (4 * (row % 2))) & 0xF
        signed = np.where(nibbles > 7, nibbles.astype(int) - 16, nibbles)
        np.testing.assert_array_equal(np.float32(signed) * np.repeat(scales[row], 32), expected[row])
    assert quantization(directory) == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": 32,
        "has_zero_point": False,
        "pre_quant_scale": False,
        "exclude_modules": ["lm_head", "model.embed_tokens"],
        "scheme": "as the test says",
    }


@given(st.integers(1, 20), st.integers(1, 40), st.randoms(use_true_random=False))
def test_packed_rows_unpack_to_what_they_were(pairs: int, columns: int, random: Any) -> None:
    codes = np.array([[random.randrange(16) for _ in range(columns)] for _ in range(2 * pairs)], np.uint8)
    np.testing.assert_array_equal(unpack_rows(pack_rows(codes)), codes)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([32, 64, 96]), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans(), st.booleans()
)
def test_models_of_all_shapes_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, hidden: int, kv_heads: int, layers: int, tied: bool, half: bool
) -> None:
    base = tmp_path_factory.mktemp("shapes")
    source = make_tiny_hf(
        base / "tiny",
        hidden=hidden,
        kv_heads=kv_heads,
        layers=layers,
        tied=tied,
        dtype="bfloat16" if half else "float32",
    )
    checkpoint, read = open_checkpoint(source), open_quantized(write(base / "out", source, int8_products))
    assert read.architecture == checkpoint.architecture
    np.testing.assert_array_equal(
        floats(read.linear(layers - 1, DOWN)),
        floats(int8_products(checkpoint.tensor(layer_tensor(layers - 1, DOWN)))),
    )
    for table in [EMBEDDING] if tied else [EMBEDDING, HEAD]:
        expected = checkpoint.tensor(table).astype(ml_dtypes.bfloat16 if half else np.float16)
        np.testing.assert_array_equal(read.rows(table, 0, 300), expected.astype(np.float32))


def test_layers_of_different_precision_are_listed_by_module(source: Path, tmp_path: Path) -> None:
    forms = dict.fromkeys(LINEARS, symmetric(4)) | {DOWN: int8_products}
    directory = write(tmp_path / "out", source, forms)
    config = quantization(directory)
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"][layer_tensor(1, DOWN).removesuffix(".weight")] == {
        "quant_algo": "W8A8_SQ_PER_CHANNEL"
    }
    assert (
        config["quantized_layers"][layer_tensor(1, QUERY).removesuffix(".weight")]["quant_algo"]
        == "W4A16_AWQ"
    )
    embedded = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert sorted(len(group["targets"]) for group in embedded["config_groups"].values()) == [2, 12]
    open_quantized(directory).linear(1, DOWN)


def test_linears_left_as_they_are_are_excluded(source: Path, tmp_path: Path) -> None:
    forms = {**dict.fromkeys(LINEARS, symmetric(4)), DOWN: FORMS["floats"]}
    assert (
        layer_tensor(1, DOWN).removesuffix(".weight")
        in quantization(write(tmp_path / "out", source, forms))["exclude_modules"]
    )


def test_a_group_of_zeros_has_a_scale_that_loaders_can_divide_by(tmp_path: Path, source: Path) -> None:
    def with_zeros(weight: np.ndarray) -> Linear:
        weight = weight.copy()
        weight[0, :32] = 0
        return symmetric(4)(weight)

    directory = write(tmp_path / "out", source, with_zeros)
    scales = load_file(directory / "model-00001-of-00003.safetensors")[f"{layer_tensor(0, DOWN)}_scale"]
    assert (scales > 0).all()
    assert not floats(open_quantized(directory).linear(0, DOWN))[0, :32].any()


def test_scales_of_a_kv_cache_stand_beside_the_linears(source: Path, tmp_path: Path) -> None:
    directory = write(
        tmp_path / "out", source, symmetric(4), kv_scales=KvCacheScales("INT8", [0.5, 0.25], [2, 4])
    )
    assert quantization(directory)["kv_cache_quant_algo"] == "INT8"
    tensors = load_file(directory / "model-00002-of-00003.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.k_scale"] == np.float32(0.25)
    assert tensors["model.layers.1.self_attn.v_proj.v_scale"] == np.float32(4)


def test_values_above_float16_make_the_tables_bfloat16(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    tensors = load_file(source / "model.safetensors")
    tensors[EMBEDDING][250, 3] = 1e5
    save_file(tensors, source / "model.safetensors")
    directory = write(tmp_path / "out", source, symmetric(4))
    assert read_header(directory / "model-00003-of-00003.safetensors")[EMBEDDING].kind == ml_dtypes.bfloat16
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert open_quantized(directory).rows(EMBEDDING, 250, 251)[0, 3] == pytest.approx(1e5, rel=0.01)


def test_a_gguf_file_gets_the_metadata_of_a_directory(tmp_path: Path) -> None:
    source = make_tiny_gguf(tmp_path / "tiny.gguf", quantization="Q4_0")
    checkpoint, read = open_checkpoint(source), open_quantized(write(tmp_path / "out", source, symmetric(4)))
    assert read.architecture == checkpoint.architecture
    assert read.tokenizer == checkpoint.tokenizer


def phi(directory: Path) -> Path:
    make_tiny_hf(directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        parts = [tensors.pop(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkv"]
        tensors[f"{prefix}.self_attn.qkv_proj.weight"] = np.concatenate(parts)
        parts = [tensors.pop(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"{prefix}.mlp.gate_up_proj.weight"] = np.concatenate(parts)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    return directory


def test_biases_have_sixteen_bits_and_are_read_back(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for part, rows in (("q", 64), ("k", 32), ("v", 32)):
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = np.linspace(
                -3, 3, rows, dtype=np.float32
            )
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    directory = write(tmp_path / "out", source, symmetric(4))
    name = "model.layers.1.self_attn.v_proj.bias"
    assert load_file(directory / "model-00002-of-00003.safetensors")[name].dtype == np.float16
    np.testing.assert_array_equal(open_quantized(directory).vector(name), tensors[name].astype(np.float16))


def test_linears_that_the_family_stores_as_one_are_written_as_one(tmp_path: Path) -> None:
    source = phi(tmp_path / "phi")
    directory = write(tmp_path / "out", source, symmetric(4))
    names = set(read_header(directory / "model-00001-of-00003.safetensors"))
    assert "model.layers.0.self_attn.qkv_proj.weight_scale" in names
    assert not any("q_proj" in name for name in names)
    checkpoint, read = open_checkpoint(source), open_quantized(directory)
    for part in LINEARS:
        expected = layer_of(checkpoint, 1, symmetric(4)).linears[part]
        np.testing.assert_array_equal(floats(read.linear(1, part)), floats(expected))


def test_linears_stored_as_one_cannot_have_two_forms(tmp_path: Path) -> None:
    forms = dict.fromkeys(LINEARS, symmetric(4)) | {QUERY: symmetric(8)}
    with pytest.raises(BuildError, match=r"qkv_proj.*different"):
        write(tmp_path / "out", phi(tmp_path / "phi"), forms)


def test_the_gain_of_a_gemma_is_stored_less_one(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = tensors["model.norm.weight"].copy()
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
    }
    (source / "config.json").write_text(json.dumps(config))
    directory = write(tmp_path / "out", source, symmetric(4))
    name = "model.layers.1.input_layernorm.weight"
    stored = load_file(directory / "model-00002-of-00003.safetensors")[name]
    np.testing.assert_allclose(stored, tensors[name], atol=1e-6)
    checkpoint, read = open_checkpoint(source), open_quantized(directory)
    for vector in (name, FINAL_NORM):
        np.testing.assert_allclose(read.vector(vector), checkpoint.tensor(vector), atol=1e-6)


def test_a_build_that_was_cut_off_goes_on_behind_its_last_layer(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    with CheckpointWriter(tmp_path / "out", checkpoint, key="a", scheme="s") as writer:
        writer.add_layer(0, layer_of(checkpoint, 0, symmetric(4)))
    assert not (tmp_path / "out").exists()
    with CheckpointWriter(tmp_path / "out", checkpoint, key="a", scheme="s") as writer:
        assert writer.done == 1
        writer.add_layer(1, layer_of(checkpoint, 1, symmetric(4)))
        writer.finish()
    assert all_bytes(tmp_path / "out") == all_bytes(
        write(tmp_path / "whole", source, symmetric(4), scheme="s")
    )
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_another_key_starts_anew(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    with CheckpointWriter(tmp_path / "out", checkpoint, key="a", scheme="s") as writer:
        writer.add_layer(0, layer_of(checkpoint, 0, symmetric(4)))
    with CheckpointWriter(tmp_path / "out", checkpoint, key="b", scheme="s") as writer:
        assert writer.done == 0


_KILLED = """
import os, signal, sys
from pathlib import Path
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.quantized import CheckpointWriter, tensor_writer
from tests.unit.buildhost.quantized_layers import layer_of, symmetric
source, directory, files = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write_pieces, seen = tensor_writer._write_pieces, []
def killed_in_the_middle(file, tensor):
    write_pieces(file, tensor)
    if len({*seen, file.name}) > files:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(file.name)
tensor_writer._write_pieces = killed_in_the_middle
checkpoint = open_checkpoint(source)
writer = CheckpointWriter(directory, checkpoint, key="key", scheme="as the test says")
with writer:
    for index in range(checkpoint.architecture.layers):
        writer.add_layer(index, layer_of(checkpoint, index, symmetric(4)))
    writer.finish()
"""


@pytest.mark.parametrize(
    ("files", "layers"), [(0, 0), (1, 1), (2, 2)], ids=["first layer", "second", "tables"]
)
def test_a_killed_build_leaves_nothing_half_and_is_finished_by_the_next(
    files: int, layers: int, source: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "out"
    command = [sys.executable, "-c", _KILLED, str(source), str(directory), str(files)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not directory.exists()
    assert list((tmp_path / ".out.partial").glob(".*.unfinished"))
    checkpoint = open_checkpoint(source)
    with CheckpointWriter(directory, checkpoint, key="key", scheme="as the test says") as writer:
        assert writer.done == layers
    write(directory, source, symmetric(4))
    assert all_bytes(directory) == all_bytes(write(tmp_path / "whole", source, symmetric(4)))


_ON_A_FULL_DISK = """
import sys
from pathlib import Path
from edgellm_buildhost.errors import BuildError
from tests.unit.buildhost.quantized_layers import symmetric, write
source, directory = Path(sys.argv[1]), Path(sys.argv[2])
ballast = directory.parent / "ballast"
ballast.write_bytes(bytes(int(sys.argv[3])))
try:
    write(directory, source, symmetric(4))
except BuildError as error:
    print(error, "|", error.hint)
print(sorted(path.suffix for path in (directory.parent / ".out.partial").iterdir()), directory.exists())
ballast.unlink()
write(directory, source, symmetric(4))
print(sorted(path.name for path in directory.parent.iterdir()))
"""


@pytest.mark.parametrize("room", [45_000, 90_000], ids=["layers", "tables"])
def test_a_full_disk_is_named_and_the_next_run_goes_on(room: int, source: Path, tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    size = 400_000
    prefix = small_disk(mount, str(size))
    # A tmpfs gives whole pages, and has none but these.
    ballast = (size // 4096 - -(-room // 4096)) * 4096
    error, left, final = run_on(prefix, _ON_A_FULL_DISK, source, mount / "out", ballast).splitlines()
    assert "No space left on device" in error
    assert "free some space and run it again" in error
    assert ".unfinished" not in left
    assert left.endswith("False")
    assert final == "['out']"


def test_two_builds_of_one_checkpoint_do_not_mix(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    with (
        CheckpointWriter(tmp_path / "out", checkpoint, key="a", scheme="s"),
        pytest.raises(BuildError, match="another build"),
    ):
        CheckpointWriter(tmp_path / "out", checkpoint, key="b", scheme="s")


def test_what_is_at_the_target_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(BuildError, match="there is something already"):
        write(tmp_path / "out", source, symmetric(4))
    assert not (tmp_path / ".out.partial").exists()


def test_groups_that_do_not_fill_a_row_are_refused(source: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source)
    layer = layer_of(checkpoint, 0, symmetric(4))
    query = layer.linears[QUERY]
    assert isinstance(query, QuantizedTensor)
    short = replace(query, columns=63)
    with (
        CheckpointWriter(tmp_path / "out", checkpoint, key="a", scheme="s") as writer,
        pytest.raises(BuildError, match="groups of 32 do not divide 63 inputs"),
    ):
        writer.add_layer(0, QuantizedLayer({**layer.linears, QUERY: short}, layer.vectors))


def test_a_table_is_written_a_few_rows_at_a_time(tmp_path: Path) -> None:
    seen: list[int] = []

    def pieces() -> Any:
        for start in range(0, 1000, 100):
            seen.append(start)
            yield np.full((100, 3), start, np.float16)

    path = tmp_path / "file.safetensors"
    write_tensors(path, [Pending("table", np.dtype(np.float16), (1000, 3), pieces)])
    assert len(seen) == 10
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("table")[:, 0], np.arange(1000) // 100 * 100)
