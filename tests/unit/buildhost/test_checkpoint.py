"""Checkpoints: both readers see one model, and damage is named with its next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from edgellm_buildhost.checkpoint import open_checkpoint, tensor_shapes
from edgellm_buildhost.checkpoint.rope import scaled_frequencies
from edgellm_buildhost.errors import BuildError
from tests.support.tiny_models import (
    CHAT_TEMPLATE,
    EOS_ID,
    TinySpec,
    make_tiny_gguf,
    make_tiny_hf,
    tiny_tensors,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "tiny")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, **changes: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def test_both_formats_of_one_model_read_the_same(tmp_path: Path, hf: Path) -> None:
    from_hf = open_checkpoint(hf)
    from_gguf = open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf"))
    assert from_gguf.architecture == from_hf.architecture
    assert from_gguf.tokenizer == from_hf.tokenizer
    for name in tensor_shapes(from_hf.architecture):
        np.testing.assert_array_equal(from_gguf.tensor(name), from_hf.tensor(name))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precisions_and_shards_are_read(tmp_path: Path, dtype: str, tolerance: float) -> None:
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "tiny", dtype=dtype, shards=3))
    for name, expected in tiny_tensors(TinySpec()).items():
        np.testing.assert_allclose(checkpoint.tensor(name), expected, rtol=tolerance, atol=1e-6)


def test_quantized_gguf_tensors_are_dequantized(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf", quantization="Q8_0"))
    np.testing.assert_allclose(checkpoint.tensor(Q_PROJ), tiny_tensors(TinySpec())[Q_PROJ], atol=0.01)


@pytest.mark.parametrize("make", [make_tiny_hf, make_tiny_gguf])
def test_the_tokenizer_returns_every_text(make: Any, tmp_path: Path) -> None:
    files = open_checkpoint(make(tmp_path / "tiny.gguf")).tokenizer
    tokenizer = Tokenizer.from_str(files.tokenizer_json.decode())
    text = "<|im_start|>user\nWhat is 12 + 7? Größe 漢字 🙂<|im_end|>\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert EOS_ID in ids
    assert files.eos_ids == (EOS_ID,)
    assert files.chat_template == CHAT_TEMPLATE


def test_scaled_rotary_positions_are_slower_where_they_should_be() -> None:
    plain = np.array(scaled_frequencies(10000.0, 64, None))
    linear = np.array(scaled_frequencies(10000.0, 64, {"type": "linear", "factor": 4.0}))
    np.testing.assert_allclose(linear, plain / 4)
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    ratio = np.array(scaled_frequencies(500000.0, 128, llama3)) / np.array(
        scaled_frequencies(500000.0, 128, None)
    )
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 0).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_named(hf: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(hf, **changes)
    with pytest.raises(BuildError) as caught:
        open_checkpoint(hf)
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(hf: Path, file: str) -> None:
    (hf / file).unlink()
    with pytest.raises(BuildError, match=file):
        open_checkpoint(hf)


def test_a_missing_shard_is_named_before_the_work_begins(tmp_path: Path) -> None:
    directory = make_tiny_hf(tmp_path / "tiny", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BuildError, match=r"model-00002-of-00002\.safetensors: shard missing"):
        open_checkpoint(directory)


def test_an_index_cannot_point_outside_the_directory(tmp_path: Path) -> None:
    directory = make_tiny_hf(tmp_path / "tiny", shards=2)
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))
    with pytest.raises(BuildError, match="outside the directory"):
        open_checkpoint(directory)


def test_a_tensor_of_another_shape_is_named(hf: Path) -> None:
    edit_tensors(hf, model__norm__weight=np.ones(32, np.float32))
    with pytest.raises(BuildError, match=r"model\.norm\.weight has shape \[32\].*\[64\]"):
        open_checkpoint(hf).tensor("model.norm.weight")


def test_a_missing_tensor_is_named(hf: Path) -> None:
    edit_tensors(hf, model__norm__weight=None)
    with pytest.raises(BuildError, match=r"no tensor model\.norm\.weight"):
        open_checkpoint(hf).tensor("model.norm.weight")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(hf: Path, value: float) -> None:
    edit_tensors(hf, model__norm__weight=np.full(64, value, np.float32))
    with pytest.raises(BuildError, match="64 values that are not finite"):
        open_checkpoint(hf).tensor("model.norm.weight")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_gguf_file_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BuildError) as caught:
        open_checkpoint(path)
    assert "tiny.gguf" in caught.value.message


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(BuildError, match="not a GGUF file"):
        open_checkpoint(path)


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("general.architecture", b"llama", b"mamba"),
        ("tokenizer.ggml.model", b"gpt2", b"bert"),
        ("tokenizer.ggml.pre", b"smollm", b"xmollm"),
    ],
)
def test_a_gguf_field_that_is_not_supported_is_named(
    tmp_path: Path, key: str, old: bytes, new: bytes
) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    at = data.index(key.encode()) + len(key)
    path.write_bytes(data[:at] + data[at:].replace(old, new, 1))
    with pytest.raises(BuildError, match=key):
        open_checkpoint(path)
