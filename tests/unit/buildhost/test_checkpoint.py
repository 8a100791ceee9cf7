"""Checkpoints: both readers see one model, and damage is named with its next step."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from edgellm_buildhost.architecture import (
    DOWN,
    EMBEDDING,
    GATE,
    KEY,
    QUERY,
    UP,
    VALUE,
    layer_tensor,
    tensor_shapes,
)
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.checkpoint.rope import scaled_frequencies
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.checkpoint.stored import StoredNames
from edgellm_buildhost.errors import BuildError
from tests.support.tiny_families import CONFIGS, family_tensors, write_family
from tests.support.tiny_models import (
    BOS_ID,
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


def settings(fields: dict[str, Any]) -> Settings:
    return Settings(Path("config.json"), fields)


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
    linear = np.array(scaled_frequencies(10000.0, 64, settings({"type": "linear", "factor": 4.0})))
    np.testing.assert_allclose(linear, plain / 4)
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    ratio = np.array(scaled_frequencies(500000.0, 128, settings(llama3))) / np.array(
        scaled_frequencies(500000.0, 128, None)
    )
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 8)
    assert (np.diff(ratio) <= 0).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"attention_bias": True}, "no tensor model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 1}, "a tensor model.layers.1.input_layernorm.weight"),
        ({"intermediate_size": 130}, "mlp.gate_proj.weight has shape [128, 64]"),
        ({"quantization_config": {"bits": 4}}, "quantized already (quantization_config in config.json)"),
        ({"tie_word_embeddings": False}, "there is no tensor lm_head.weight"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_named(hf: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(hf, **changes)
    with pytest.raises(BuildError) as caught:
        open_checkpoint(hf)
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"', "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_named(hf: Path, text: str) -> None:
    (hf / "config.json").write_text(text)
    with pytest.raises(BuildError, match=r"config\.json: (not JSON|should hold)"):
        open_checkpoint(hf)


def test_what_a_quantizer_left_in_the_directory_is_named(hf: Path) -> None:
    (hf / "hf_quant_config.json").write_text("{}")
    with pytest.raises(BuildError, match=r"quantized already \(hf_quant_config\.json\)") as caught:
        open_checkpoint(hf)
    assert "open_quantized" in caught.value.hint


@pytest.mark.parametrize("part", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.router.weight"])
def test_a_tensor_that_the_configuration_does_not_explain_is_refused(hf: Path, part: str) -> None:
    edit_tensors(hf, **{f"model__layers__0__{part.replace('.', '__')}": np.ones(64, np.float32)})
    with pytest.raises(BuildError, match=f"there is a tensor model.layers.0.{part}"):
        open_checkpoint(hf)


def test_angles_that_old_checkpoints_carry_are_no_weights(hf: Path) -> None:
    edit_tensors(hf, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(8, np.float32))
    open_checkpoint(hf)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_those_of_the_whole_table(tmp_path: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "tiny", dtype=dtype))
    table = checkpoint.tensor(EMBEDDING)
    for start, stop in ((0, 300), (0, 1), (7, 100), (290, 400)):
        np.testing.assert_array_equal(checkpoint.rows(EMBEDDING, start, stop), table[start:stop])


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q4_1"])
def test_rows_of_a_gguf_table_are_those_of_the_whole(tmp_path: Path, quantization: str) -> None:
    checkpoint = open_checkpoint(make_tiny_gguf(tmp_path / "tiny.gguf", quantization=quantization))
    for name in (EMBEDDING, Q_PROJ):
        np.testing.assert_array_equal(checkpoint.rows(name, 5, 33), checkpoint.tensor(name)[5:33])


def test_rows_that_are_no_numbers_are_refused(hf: Path) -> None:
    table = tiny_tensors(TinySpec())[EMBEDDING]
    table[200] = np.nan
    edit_tensors(hf, model__embed_tokens__weight=table)
    checkpoint = open_checkpoint(hf)
    checkpoint.rows(EMBEDDING, 0, 200)
    with pytest.raises(BuildError, match="64 values that are not finite"):
        checkpoint.rows(EMBEDDING, 150, 201)


def test_a_few_rows_take_the_memory_of_a_few_rows(tmp_path: Path) -> None:
    directory = make_tiny_hf(tmp_path / "tiny", vocab=20_000, dtype="bfloat16")
    checkpoint = open_checkpoint(directory)
    tracemalloc.start()
    checkpoint.rows(EMBEDDING, 10_000, 10_100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 64 * 2  # bytes of the whole table, as it lies in the file


def test_fused_linears_are_taken_apart(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "phi", "phi3"))
    stored = family_tensors(CONFIGS["phi3"])
    parts = [checkpoint.tensor(layer_tensor(1, part)) for part in (QUERY, KEY, VALUE)]
    np.testing.assert_array_equal(np.concatenate(parts), stored["model.layers.1.self_attn.qkv_proj.weight"])
    assert [len(part) for part in parts] == [64, 32, 32]
    parts = [checkpoint.tensor(layer_tensor(0, part)) for part in (GATE, UP)]
    np.testing.assert_array_equal(np.concatenate(parts), stored["model.layers.0.mlp.gate_up_proj.weight"])
    np.testing.assert_array_equal(
        checkpoint.rows(layer_tensor(0, KEY), 3, 9), checkpoint.tensor(layer_tensor(0, KEY))[3:9]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_stored_row_is_read_exactly_once(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "hf", name))
    stored = {name: len(tensor) for name, tensor in family_tensors(CONFIGS[name]).items()}
    names = StoredNames(checkpoint.architecture, stored)
    places = [names.place(ours) for ours in tensor_shapes(checkpoint.architecture)]
    read = sorted((place.name, row) for place in places for row in range(place.start, place.stop))
    assert read == sorted((name, row) for name, rows in stored.items() for row in range(rows))


def test_gains_of_gemma_are_true_gains(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "gemma", "gemma3"))
    stored = family_tensors(CONFIGS["gemma3"])
    gains = [name for name in stored if stored[name].ndim == 1]
    assert len(gains) == 4 * 6 + 1
    for name in gains:
        np.testing.assert_array_equal(checkpoint.tensor(name), stored[name] + np.float32(1))
    np.testing.assert_array_equal(checkpoint.tensor(EMBEDDING), stored[EMBEDDING])


@pytest.mark.parametrize("form", ["language_model.model.", "model.language_model.", "model."])
def test_a_language_model_is_found_under_every_prefix_in_use(tmp_path: Path, form: str) -> None:
    directory = write_family(tmp_path / "gemma", "gemma3-multimodal")
    config = CONFIGS["gemma3-multimodal"]
    plain = {name.removeprefix("language_model."): tensor for name, tensor in family_tensors(config).items()}
    stored = {form + name.removeprefix("model."): tensor for name, tensor in plain.items()}
    save_file(
        stored | {"vision_tower.post_layernorm.bias": np.ones(4, np.float32)}, directory / "model.safetensors"
    )
    checkpoint = open_checkpoint(directory)
    name = layer_tensor(0, DOWN)
    np.testing.assert_array_equal(checkpoint.tensor(name), plain[name])
    assert checkpoint.tokenizer.eos_ids == (EOS_ID, 1)


def write_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(fields))


def add_bos_to_every_text(directory: Path) -> None:
    """As the tokenizers of Llama 3 do it: by a post-processor, and tokenizer_config.json says nothing."""
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS_ID)]
    )
    tokenizer.save(str(path))


@pytest.mark.parametrize(
    ("processor", "field", "added"),
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"add_bos_token": True}, True),
        (True, {"add_bos_token": False}, False),
    ],
)
def test_a_text_begins_as_the_tokenizer_begins_it(
    hf: Path, processor: bool, field: dict[str, Any], added: bool
) -> None:
    if processor:
        add_bos_to_every_text(hf)
    write_json(hf / "tokenizer_config.json", **field)
    tokenizer = open_checkpoint(hf).tokenizer
    assert (tokenizer.add_bos, tokenizer.bos_id) == (added, BOS_ID)


def test_all_ends_of_a_text_are_known_and_the_template_finds_its_own_first(hf: Path) -> None:
    write_json(hf / "generation_config.json", eos_token_id=[0, 1, 2, 1])
    assert open_checkpoint(hf).tokenizer.eos_ids == (2, 0, 1)
    write_json(hf / "tokenizer_config.json", eos_token={"content": "<|im_start|>"})
    assert open_checkpoint(hf).tokenizer.eos_ids == (1, 0, 2)


@pytest.mark.parametrize("eos", ["</s>", [], [1.5], -1, True])
def test_ends_that_are_no_ids_are_named(hf: Path, eos: Any) -> None:
    write_json(hf / "generation_config.json", eos_token_id=eos)
    with pytest.raises(BuildError, match=r"generation_config\.json: eos_token_id should be"):
        open_checkpoint(hf)


def test_a_model_without_an_end_is_refused(hf: Path) -> None:
    (hf / "generation_config.json").unlink()
    edit_config(hf, eos_token_id=None)
    with pytest.raises(BuildError, match="eos_token_id is missing"):
        open_checkpoint(hf)


def test_the_chat_template_is_found_wherever_publishers_put_it(hf: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(hf / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(hf).tokenizer.chat_template == "D"
    write_json(hf / "tokenizer_config.json", chat_template=named[:1])
    assert open_checkpoint(hf).tokenizer.chat_template == "T"
    write_json(hf / "tokenizer_config.json")
    assert open_checkpoint(hf).tokenizer.chat_template is None
    write_json(hf / "chat_template.json", chat_template="P")
    assert open_checkpoint(hf).tokenizer.chat_template == "P"
    (hf / "chat_template.jinja").write_text("J")
    assert open_checkpoint(hf).tokenizer.chat_template == "J"


def test_a_damaged_tokenizer_is_named(hf: Path) -> None:
    (hf / "tokenizer.json").write_text("{}")
    with pytest.raises(BuildError, match=r"tokenizer\.json: not a tokenizer"):
        open_checkpoint(hf)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_safetensors_file_cut_short_is_refused(hf: Path, kept: float) -> None:
    path = hf / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BuildError, match=r"model\.safetensors: damaged or cut short"):
        open_checkpoint(hf)


def test_an_index_that_names_a_tensor_which_is_not_in_its_shard_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_hf(tmp_path / "tiny", shards=2)
    index = directory / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    swapped = dict(zip(names, reversed(list(names.values())), strict=True))
    write_json(index, weight_map=swapped)
    with pytest.raises(BuildError, match=r"says it is there"):
        open_checkpoint(directory)


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
