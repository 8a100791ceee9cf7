"""An INT8 KV cache: calibrated while the engine is built, and close to a float one when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from edgellm.bundle import EngineConfig
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.calibration.kv import calibrate
from edgellm_buildhost.calibration.text import Text
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.reference import Engine

# A code is at most half a step from its value, 0.4 % of the largest of its channel. On 20 passages that moved
# logits, whose spread is 8, by 0.04 on average and 0.08 at most; a wrong scale or position moves them by 8.
MEAN_TOLERANCE = 0.15
only_where_it_runs = pytest.mark.skipif(
    Version(ort.__version__) < Version("1.32"), reason="this version has no INT8 KV cache with ragged rows"
)


@dataclass(frozen=True)
class Pair:
    """One model with a cache of either kind."""

    floats: Path
    codes: Path
    config: EngineConfig
    ids: np.ndarray


def build(source: Path, directory: Path, kv: KvName) -> EngineConfig:
    directory.mkdir()
    return build_engine(
        open_checkpoint(source), QuantName.INT8, directory, profile="host", kv=kv, accuracy_level=0
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("pair")
    source = make_tiny_hf(path / "tiny", layers=3, head_dim=32)
    build(source, path / "floats", KvName.FLOAT32)
    config = build(source, path / "codes", KvName.INT8)
    # Of the language of the calibration, but another passage.
    tokenizer = Tokenizer.from_file(str(path / "codes" / config.files.tokenizer))
    ids = np.array(
        tokenizer.encode("A robot crosses the hall; its list of tasks is [3, 17] and empty after").ids[:40]
    )
    return Pair(path / "floats", path / "codes", config, ids)


def past(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(logits - expected).mean() < MEAN_TOLERANCE
    # The codes are used: eight bits do make a difference.
    assert np.abs(logits - expected).max() > 1e-4


@only_where_it_runs
def test_a_prompt_in_chunks_gives_nearly_the_logits_of_a_float_cache(pair: Pair) -> None:
    codes, floats = Engine(pair.codes), Engine(pair.floats)
    for start, end in ((0, 20), (20, 21), (21, 40)):
        chunk = pair.ids[None, start:end]
        assert_close(codes.step(chunk, past(start)), floats.step(chunk, past(start)))


@only_where_it_runs
def test_tokens_one_by_one_and_in_a_batch_give_nearly_the_same(pair: Pair) -> None:
    codes, floats = Engine(pair.codes, rows=2), Engine(pair.floats, rows=2)
    for at in range(len(pair.ids) // 2):
        tokens = pair.ids[[at, at + 20]][:, None]
        logits, expected = codes.step(tokens, past(at, at)), floats.step(tokens, past(at, at))
    assert_close(logits, expected)


@only_where_it_runs
def test_what_was_never_written_is_never_read(pair: Pair) -> None:
    steps = []
    for unwritten in (127, -128):
        engine = Engine(pair.codes, unwritten=unwritten)
        engine.step(pair.ids[None, :20], past(0))
        steps.append(engine.step(pair.ids[None, 20:21], past(20)))
    np.testing.assert_array_equal(*steps)


@only_where_it_runs
def test_codes_times_scales_are_the_keys_and_values_of_a_float_cache(pair: Pair) -> None:
    codes, floats = Engine(pair.codes), Engine(pair.floats)
    for engine in (codes, floats):
        engine.step(pair.ids[None], past(0))
    scales = {
        item.name: item
        for item in onnx.load(pair.codes / "model.onnx", load_external_data=False).graph.initializer
    }
    for kind in ("key", "value"):
        # Only the first layer's are computed from equal inputs.
        name = f"kv_{kind}_0"
        scale = onnx.numpy_helper.to_array(scales[f"layer0.{kind}_scale"])
        written = np.s_[:, :, : len(pair.ids)]
        stored, exact = codes.caches[name][written].astype(int), floats.caches[name][written]
        inside = np.abs(stored) < 127
        assert inside.mean() > 0.99
        assert (np.abs(stored * scale - exact) <= 0.501 * scale)[inside].all()


def test_its_config_says_what_it_needs_and_takes_a_quarter_of_the_memory(pair: Pair) -> None:
    assert pair.config.name == "tiny-int8-kv-int8"
    assert pair.config.precision.kv == "int8"
    floats = pair.config.model_copy(
        update={"precision": pair.config.precision.model_copy(update={"kv": "float32"})}
    )
    assert 4 * pair.config.kv_bytes_per_token == floats.kv_bytes_per_token
    versions = SpecifierSet(pair.config.runtime_requires)
    assert "1.32.0" in versions
    assert "1.31.1" not in versions
    assert pair.config.files.graph_ragged == pair.config.files.graph
    assert [path.name for path in pair.codes.glob("*.onnx")] == [pair.config.files.graph]


def test_scales_leave_room_above_the_largest_value_and_none_is_zero(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    weights = load_file(source / "model.safetensors")
    silent = "model.layers.1.self_attn.v_proj.weight"
    save_file(weights | {silent: np.zeros_like(weights[silent])}, source / "model.safetensors")
    build(source, tmp_path / "engine", KvName.FLOAT32)
    seen: list[tuple[int, int]] = []
    scales = calibrate(
        tmp_path / "engine" / "model.onnx",
        open_checkpoint(source).architecture,
        np.random.default_rng(0).integers(3, 300, (4, 100)),
        lambda done, total: seen.append((done, total)),
    )
    assert scales.keys.shape == scales.values.shape == (2, 2, 16)
    assert (scales.keys > 0).all()
    assert (scales.values > 0).all()
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_calibration_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    (tmp_path / "engine").mkdir()
    with pytest.raises(BuildError, match="one line: 2 tokens, a window has 512"):
        build_engine(
            open_checkpoint(source),
            QuantName.INT8,
            tmp_path / "engine",
            profile="host",
            kv=KvName.INT8,
            text=Text("one line", "abc"),
        )


def test_a_model_that_overflows_is_refused_with_the_layer(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    weights = load_file(source / "model.safetensors")
    loud = "model.layers.1.input_layernorm.weight"
    save_file(weights | {loud: np.full_like(weights[loud], 3e38)}, source / "model.safetensors")
    with pytest.raises(BuildError, match="layer 1 computes keys that are not finite"):
        build(source, tmp_path / "engine", KvName.INT8)
