"""The runner of engines: how a text is cut into steps, and which logits are asked for, changes no figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from packaging.version import Version

from edgellm.bundle import EngineConfig
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import KvName, QuantName
from edgellm_buildhost.runner import Runner, runs_here
from tests.support.tiny_models import make_tiny_hf

VOCAB = 300
TOKENS = np.random.default_rng(3).integers(3, VOCAB, (1, 40))
FLOAT_ROUNDING = 2e-4


def build(path: Path, kv: KvName = KvName.FLOAT32) -> tuple[Path, EngineConfig]:
    """An engine that computes in float32: its graph, and what it says of itself."""
    (path / "engine").mkdir()
    checkpoint = open_checkpoint(make_tiny_hf(path / "tiny"))
    config = build_engine(
        checkpoint, QuantName.INT4, path / "engine", profile="host", kv=kv, accuracy_level=0, canary=False
    )
    return path / "engine" / config.files.graph, config


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineConfig]:
    return build(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def graph(engine: tuple[Path, EngineConfig]) -> Path:
    return engine[0]


@pytest.fixture(scope="module")
def whole(graph: Path) -> np.ndarray:
    """Logits of all tokens, fed at once."""
    logits = np.full((40, VOCAB), np.nan, np.float32)
    Runner(graph, 40).feed(TOKENS, 0, logits)
    assert np.isfinite(logits).all()
    return logits


@pytest.mark.parametrize("cuts", [(1,), (7, 8, 39), tuple(range(1, 40))], ids=["two", "four", "one by one"])
def test_chunks_give_the_logits_of_the_whole(graph: Path, whole: np.ndarray, cuts: tuple[int, ...]) -> None:
    runner, logits = Runner(graph, 40), np.full((40, VOCAB), np.nan, np.float32)
    for start, stop in zip((0, *cuts), (*cuts, 40), strict=True):
        runner.feed(TOKENS[:, start:stop], start, logits[start:stop])
    np.testing.assert_allclose(logits, whole, atol=FLOAT_ROUNDING)


@pytest.mark.parametrize("wanted", [1, 5])
def test_the_last_logits_are_those_of_the_last_tokens(graph: Path, whole: np.ndarray, wanted: int) -> None:
    logits = np.full((wanted, VOCAB), np.nan, np.float32)
    Runner(graph, 40).feed(TOKENS, 0, logits)
    np.testing.assert_allclose(logits, whole[-wanted:], atol=FLOAT_ROUNDING)


def test_a_step_without_logits_still_fills_the_cache(graph: Path, whole: np.ndarray) -> None:
    runner, logits = Runner(graph, 64), np.empty((1, VOCAB), np.float32)
    runner.feed(TOKENS[:, :39], 0)
    for cache in runner.caches.values():
        assert cache.shape[2] == 64
        assert cache[:, :, :39].any(axis=(0, 1, 3)).all()
        assert not cache[:, :, 39:].any()
    runner.feed(TOKENS[:, 39:], 39, logits)
    np.testing.assert_allclose(logits[0], whole[39], atol=FLOAT_ROUNDING)


def test_rows_are_computed_each_by_itself(graph: Path) -> None:
    together, alone = np.empty((3, VOCAB), np.float32), np.empty((1, VOCAB), np.float32)
    Runner(graph, 4, rows=3).feed(TOKENS[0, :3, None], 0, together)
    for row in range(3):
        Runner(graph, 4).feed(TOKENS[:, row : row + 1], 0, alone)
        np.testing.assert_allclose(together[row], alone[0], atol=FLOAT_ROUNDING)


def test_a_bound_step_computes_the_same_again(graph: Path) -> None:
    runner, logits = Runner(graph, 8), np.empty((1, VOCAB), np.float32)
    runner.feed(TOKENS[:, :4], 0)
    step = runner.bind(TOKENS[:, 4:6].copy(), 4, logits)
    step.run()
    first = logits.copy()
    logits.fill(np.nan)
    step.run()
    np.testing.assert_array_equal(logits, first)


@pytest.mark.parametrize(("rows", "tokens", "past"), [(1, 9, 0), (1, 1, 8), (1, 1, -1), (2, 1, 0)])
def test_tokens_without_room_are_refused_before_they_are_computed(
    graph: Path, rows: int, tokens: int, past: int
) -> None:
    runner = Runner(graph, 8)
    with pytest.raises(ValueError, match="there is room for 1 rows of 8"):
        runner.feed(np.ones((rows, tokens), np.int64), past)
    assert not any(cache.any() for cache in runner.caches.values())


@pytest.mark.skipif(Version(ort.__version__) < Version("1.32"), reason="this version has no INT8 KV cache")
def test_an_int8_cache_has_int8(tmp_path: Path) -> None:
    graph, config = build(tmp_path, KvName.INT8)
    runner = Runner(graph, 8)
    runner.feed(TOKENS[:, :8], 0)
    assert len(runner.caches) == 2 * config.model.layers
    assert all(cache.dtype == np.int8 and cache.any() for cache in runner.caches.values())


def test_an_engine_runs_here_if_it_asks_for_this_version() -> None:
    assert runs_here(f"=={ort.__version__}")
    assert not runs_here(f"!={ort.__version__}")
