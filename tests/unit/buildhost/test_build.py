"""The build: deterministic, bounded in memory, and nothing is left of one that failed."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from edgellm.bundle import Bundle, EngineConfig
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_gguf, make_tiny_hf
from tests.unit.buildhost.reference import Engine

MIB = 1024 * 1024


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_tiny_hf(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def build(source: Path, target: Path, precision: QuantName = QuantName.INT4, **options: Any) -> EngineConfig:
    target.mkdir()
    return build_engine(open_checkpoint(source), precision, target, profile="host", **options)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("kv", KvName)
@pytest.mark.parametrize(
    "precision", [quant for quant in QuantName if quant not in {QuantName.FP8, QuantName.AUTO}]
)
def test_equal_input_gives_equal_bytes(tmp_path: Path, hf: Path, precision: QuantName, kv: KvName) -> None:
    first, second = (build(hf, tmp_path / name, precision, kv=kv) for name in ("one", "two"))
    assert first == second
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_formats_of_one_model_give_the_same_engine(tmp_path: Path, hf: Path) -> None:
    build(hf, tmp_path / "one")
    build(make_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_config_says_what_was_built(tmp_path: Path, hf: Path) -> None:
    config = build(hf, tmp_path / "engine")
    assert config.name == "tiny-int4"
    assert (config.model.layers, config.model.kv_heads, config.model.head_dim) == (2, 2, 16)
    assert config.tokens.eos_ids == (2,)
    files = config.files
    named = {files.graph, files.graph_ragged, files.tokenizer, files.chat_template}
    assert named <= {path.name for path in (tmp_path / "engine").iterdir()}
    Tokenizer.from_file(str(tmp_path / "engine" / config.files.tokenizer))


def test_one_graph_is_portable_and_the_other_takes_ragged_rows_over_the_same_shards(
    tmp_path: Path, hf: Path
) -> None:
    files = build(hf, tmp_path / "engine").files
    graphs = [
        onnx.load(tmp_path / "engine" / title, load_external_data=False).graph
        for title in (files.graph, files.graph_ragged)
    ]
    attentions = [[n for n in graph.node if n.op_type == "GroupQueryAttention"] for graph in graphs]
    # More than 12 inputs are refused by 1.23; the 17th is the number of tokens that are not padding.
    assert all(len(node.input) <= 12 for node in attentions[0])
    assert all((len(node.input), node.input[16]) == (17, "query_len") for node in attentions[1])
    assert list(graphs[0].initializer) == list(graphs[1].initializer)
    assert [item.name for item in graphs[0].input] == [item.name for item in graphs[1].input]


def test_weights_lie_in_shards_of_bounded_size_and_on_pages(tmp_path: Path, hf: Path) -> None:
    build(hf, tmp_path / "engine", shard_bytes=64 * 1024)
    shards = sorted((tmp_path / "engine").glob("weights-*.bin"))
    assert len(shards) > 1
    assert all(path.stat().st_size <= 64 * 1024 for path in shards)
    graph = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False).graph
    places = [{entry.key: entry.value for entry in item.external_data} for item in graph.initializer]
    external = [place for place in places if place]
    assert {place["location"] for place in external} == {path.name for path in shards}
    assert all(int(place["offset"]) % 4096 == 0 for place in external if int(place["length"]) >= 4096)
    Engine(tmp_path / "engine").step(np.array([[1, 2, 3]]), np.array([0], np.int32))


def test_a_tied_head_reads_the_bytes_of_the_embedding(tmp_path: Path, hf: Path) -> None:
    build(hf, tmp_path / "engine")
    graph = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False).graph
    places = {
        item.name: {entry.key: entry.value for entry in item.external_data} for item in graph.initializer
    }
    assert places["head.codes"] == places["embedding.codes"]


def test_memory_follows_the_largest_matrix_and_not_the_number_of_layers(tmp_path: Path) -> None:
    shape = {"hidden": 256, "heads": 4, "head_dim": 64, "ffn": 1024}
    layer_bytes = 4 * (3 * 256 * 1024 + 3 * 256 * 256)
    peaks = []
    for layers in (2, 10):
        source = make_tiny_hf(tmp_path / f"{layers}", layers=layers, **shape)
        checkpoint = open_checkpoint(source)
        (tmp_path / f"{layers}.engine").mkdir()
        tracemalloc.start()
        build_engine(checkpoint, QuantName.INT4, tmp_path / f"{layers}.engine", profile="host")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + layer_bytes // 4
    assert peaks[1] < 12 * MIB + 4 * layer_bytes


def test_a_head_size_that_the_kernel_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="head_dim 8"):
        build(make_tiny_hf(tmp_path / "tiny", head_dim=8), tmp_path / "engine")


def run_build(*arguments: str) -> tuple[int, str]:
    """The command line, as a user sees it: exit code and all output."""
    from edgellm.cli.main import app

    result = CliRunner().invoke(app, ["build", *arguments])
    return result.exit_code, result.output


def test_the_command_writes_a_bundle_that_verifies(tmp_path: Path, hf: Path, home: Path) -> None:
    target = tmp_path / "tiny.bundle"
    code, output = run_build(str(hf), "--profile", "orin-nano-8gb", "-o", str(target), "--json")
    assert code == 0, output
    bundle = Bundle.open(target)
    bundle.verify()
    assert json.loads(output)["digest"] == bundle.variants[0].digest
    assert bundle.variants[0].config.target.profile == "orin-nano-8gb"
    assert (home / "last-build").read_text() == str(target)


def test_the_command_builds_an_int8_cache_when_asked(tmp_path: Path, hf: Path) -> None:
    code, output = run_build(str(hf), "--kv", "int8", "-o", str(tmp_path / "tiny.bundle"), "--json")
    assert code == 0, output
    assert json.loads(output)["config"]["precision"]["kv"] == "int8"
    code, output = run_build(str(hf), "--kv", "int8", "-o", str(tmp_path / "tiny.bundle"))
    assert "int8, 128 B per token" in output


def test_the_command_names_the_digest_again_for_the_same_input(tmp_path: Path, hf: Path) -> None:
    runs = [run_build(str(hf), "-o", str(tmp_path / name), "--json") for name in ("one", "two")]
    assert len({json.loads(output)["digest"] for _, output in runs}) == 1


def test_a_failed_build_says_what_to_do_and_leaves_nothing(tmp_path: Path, hf: Path, home: Path) -> None:
    weights = load_file(hf / "model.safetensors")
    last = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {last: np.full_like(weights[last], np.nan)}, hf / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    code, output = run_build(str(hf), "-o", str(out / "tiny.bundle"))
    assert code == 1
    assert last in output
    assert "try:" in output
    assert list(out.iterdir()) == []
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm_buildhost.graph.onnxruntime import OnnxRuntimeDialect

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxRuntimeDialect, "head", interrupt)
    out = tmp_path / "out"
    out.mkdir()
    code, _ = run_build(str(hf), "-o", str(out / "tiny.bundle"))
    assert code != 0
    assert list(out.iterdir()) == []


def test_an_unknown_profile_is_refused_before_the_work(tmp_path: Path, hf: Path) -> None:
    code, output = run_build(str(hf), "--profile", "toaster", "-o", str(tmp_path / "tiny.bundle"))
    assert code == 1
    assert "orin-nano-8gb" in output
