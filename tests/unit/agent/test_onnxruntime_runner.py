"""The runner of ONNX Runtime: a row's logits do not depend on whom it shares a step with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from packaging.version import Version

from edgellm.bundle import EngineConfig
from edgellm_agent.runtimes.base import EngineLoadError, KvTensor, LoadPlan, Row, StepBatch
from edgellm_agent.runtimes.onnxruntime import OnnxRuntimeRunner
from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.paged import PagedKvMemory
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_hf

# The order of additions differs between shapes of a step; products in float32 show no more of it than this.
TOLERANCE = 1e-4
# Where 8 bits hold activations or the cache, that digit may become a rounding step: of any size, but seldom.
# Measured: one row in 5,000, moved by 0.35 where logits spread by 8. A wrong mask or position moves all.
AGREEING_ROWS = 0.9

VOCAB = 300
SLOTS = 6
CAPACITY = 256
takes_ragged_rows = Version(ort.__version__) >= Version("1.32")
only_ragged = pytest.mark.skipif(not takes_ragged_rows, reason="this version takes no rows of several tokens")


@dataclass(frozen=True)
class Loaded:
    """A runner with an engine, and the memory behind it."""

    runner: OnnxRuntimeRunner
    memory: PagedKvMemory

    def feed(self, slot: int, tokens: Sequence[int], past_len: int = 0) -> NDArray[np.float32]:
        """One row by itself; logits of all its tokens."""
        if not tokens:
            return np.zeros((0, VOCAB), np.float32)
        return self.step([Row(slot, tokens, past_len, tuple(range(len(tokens))))])

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        return self.runner.step(StepBatch(tuple(rows))).copy()

    def caches(self) -> list[NDArray[Any]]:
        """Keys and values of all layers as `[slots, kv_heads, capacity, head_dim]`."""
        (space,) = self.memory.spaces
        dtype = np.float32 if self.memory.geometry.item_bytes == 4 else np.int8
        return [_array(tensor, dtype) for tensor in (*space.keys, *space.values)]


def _array(tensor: KvTensor, dtype: type[Any]) -> NDArray[Any]:
    raw = (ctypes.c_char * (tensor.shape[0] * tensor.slot_stride_bytes)).from_address(tensor.address)
    return np.frombuffer(raw, dtype).reshape(tensor.shape)


@contextmanager
def load(directory: Path, config: EngineConfig) -> Iterator[Loaded]:
    shape = config.model
    geometry = KvGeometry(shape.layers, shape.kv_heads, shape.head_dim, config.kv_item_bytes)
    loaded = Loaded(OnnxRuntimeRunner(), PagedKvMemory(geometry, SLOTS, CAPACITY))
    try:
        loaded.runner.load(LoadPlan(directory, config, loaded.memory.spaces, threads=1))
        yield loaded
    finally:
        loaded.runner.close()
        loaded.memory.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("checkpoint") / "tiny", vocab=VOCAB)


@dataclass(frozen=True)
class Engine:
    directory: Path
    config: EngineConfig

    @property
    def rounds(self) -> bool:
        """Whether activations or the cache are rounded to 8 bits on the way."""
        return self.config.kv_item_bytes == 1 or "int8" in self.config.precision.activations

    def assert_same(self, actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Rows of logits `[rows, vocab]` agree, up to what rounding makes of the order of additions."""
        assert actual.shape == expected.shape
        agreeing = np.abs(actual - expected).max(axis=1) <= TOLERANCE
        assert agreeing.mean() >= (AGREEING_ROWS if self.rounds else 1), np.flatnonzero(~agreeing)


ENGINES = [
    pytest.param((KvName.FLOAT32, 0), id="float products"),
    pytest.param((KvName.FLOAT32, 4), id="integer products"),
    pytest.param((KvName.INT8, 4), id="integer cache", marks=only_ragged),
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, source: Path) -> Engine:
    kv, accuracy_level = request.param
    directory = tmp_path_factory.mktemp("engine")
    config = build_engine(
        open_checkpoint(source),
        QuantName.INT8,
        directory,
        profile="host",
        kv=kv,
        accuracy_level=accuracy_level,
    )
    return Engine(directory, config)


@pytest.fixture(scope="module")
def loaded(engine: Engine) -> Iterator[Loaded]:
    with load(engine.directory, engine.config) as loaded:
        yield loaded


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Rows as (past length, tokens of past and query); as ragged as this version allows."""
    most = 12 if takes_ragged_rows else 1
    rows = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, most)), min_size=1, max_size=SLOTS))
    token = st.integers(0, VOCAB - 1)
    return [(past, draw(st.lists(token, min_size=past + q, max_size=past + q))) for past, q in rows]


@settings(max_examples=8, deadline=None)
@given(steps=st.lists(batches(), min_size=10, max_size=10))
def test_rows_of_one_step_get_the_logits_of_their_own_run_alone(
    engine: Engine, loaded: Loaded, steps: list[list[tuple[int, list[int]]]]
) -> None:
    alone, together = [], []
    for batch in steps:
        for slot, (past, tokens) in enumerate(batch):
            loaded.feed(slot, tokens[:past])
            alone.append(loaded.feed(slot, tokens[past:], past))
        rows = [
            Row(slot, tokens[past:], past, tuple(range(len(tokens) - past)))
            for slot, (past, tokens) in enumerate(batch)
        ]
        together.append(loaded.step(rows))
    engine.assert_same(np.concatenate(together), np.concatenate(alone))


@only_ragged
def test_padding_leaves_no_trace_in_the_cache(loaded: Loaded) -> None:
    for cache in loaded.caches():
        cache[:] = np.nan if cache.dtype == np.float32 else 77
    for slot, past in ((1, 3), (2, 20)):
        loaded.feed(slot, range(past))
    before = [cache.copy() for cache in loaded.caches()]
    logits = loaded.step([Row(1, (5,), 3, (0,)), Row(2, range(9), 20, (8,)), Row(3, (7, 8), 0, (0, 1))])
    assert np.isfinite(logits).all()
    for old, new in zip(before, loaded.caches(), strict=True):
        for slot, past, query in ((1, 3, 1), (2, 20, 9), (3, 0, 2)):
            assert np.isfinite(new[slot, :, past : past + query]).all()
            old[slot, :, past : past + query] = new[slot, :, past : past + query]
        np.testing.assert_array_equal(new, old)


@only_ragged
def test_a_row_at_the_end_of_its_slot_shares_a_step_with_a_long_one(engine: Engine, loaded: Loaded) -> None:
    tokens = [token % VOCAB for token in range(0, 7 * CAPACITY, 7)]
    loaded.feed(0, tokens[:-1])
    alone = [loaded.feed(0, tokens[-1:], CAPACITY - 1), loaded.feed(1, tokens[:30])]
    rows = [Row(0, tokens[-1:], CAPACITY - 1, (0,)), Row(1, tokens[:30], 0, tuple(range(30)))]
    together = loaded.step(rows)
    engine.assert_same(together, np.concatenate(alone))


def test_a_step_returns_the_wanted_positions_of_all_rows_in_order(engine: Engine, loaded: Loaded) -> None:
    first = loaded.feed(0, [3, 1, 4, 1, 5])
    np.testing.assert_array_equal(loaded.step([Row(0, [3, 1, 4, 1, 5], 0, (4, 1))]), first[[4, 1]])
    if takes_ragged_rows:
        second = loaded.feed(1, [9, 2, 6])
        rows = [Row(0, [3, 1, 4, 1, 5], 0, (2,)), Row(1, [9, 2, 6], 0, (0, 2))]
        expected = np.stack([first[2], second[0], second[2]])
        engine.assert_same(loaded.step(rows), expected)


def test_equal_steps_give_equal_bits_whatever_ran_in_between(loaded: Loaded) -> None:
    first = loaded.feed(0, range(20))
    # More shapes than bindings are kept, and the logits' buffer has grown.
    for length in range(1, 45):
        loaded.feed(1, range(length))
        loaded.step([Row(1, range(length), 0, ())])
    np.testing.assert_array_equal(loaded.feed(0, range(20)), first)


def test_rows_of_several_tokens_run_together_only_where_the_runner_says_so(
    engine: Engine, loaded: Loaded
) -> None:
    assert loaded.runner.capabilities().several_multi_token_rows == takes_ragged_rows
    if engine.config.precision.kv == "int8":
        return  # has no portable graph
    files = engine.config.files.model_copy(update={"graph_ragged": None})
    with load(engine.directory, engine.config.model_copy(update={"files": files})) as portable:
        assert not portable.runner.capabilities().several_multi_token_rows
        with pytest.raises(ValueError, match="alone"):
            portable.step([Row(0, (1, 2), 0, ()), Row(1, (3,), 0, (0,))])
        tokens = range(30, 42)
        engine.assert_same(portable.feed(0, tokens), loaded.feed(0, tokens))


def test_rows_that_are_not_neighbours_are_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="consecutive"):
        loaded.step([Row(0, (1,), 0, (0,)), Row(2, (1,), 0, (0,))])


def test_a_row_longer_than_its_slot_is_refused_before_it_writes(loaded: Loaded) -> None:
    before = [cache.copy() for cache in loaded.caches()]
    with pytest.raises(ValueError, match=f"capacity of {CAPACITY}"):
        loaded.feed(0, range(10), CAPACITY - 9)
    for old, new in zip(before, loaded.caches(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_row_longer_than_the_context_is_refused_even_where_its_slot_has_room(engine: Engine) -> None:
    model = engine.config.model.model_copy(update={"context_length": 20})
    with load(engine.directory, engine.config.model_copy(update={"model": model})) as short:
        assert short.feed(0, range(20)).shape == (20, VOCAB)
        with pytest.raises(ValueError, match="capacity of 20"):
            short.feed(0, (1,), 20)


def test_a_kv_cache_that_no_kernel_here_takes_is_refused_with_the_way_out(engine: Engine) -> None:
    precision = engine.config.precision.model_copy(update={"kv": "float16"})
    config = engine.config.model_copy(update={"precision": precision})
    with pytest.raises(EngineLoadError, match="--kv float32 or int8"), load(engine.directory, config):
        pass


def test_an_engine_that_the_runtime_cannot_read_is_refused_with_its_reason(
    tmp_path: Path, engine: Engine
) -> None:
    for title in ("model.onnx", "model-ragged.onnx"):
        (tmp_path / title).write_bytes(b"")
    with (
        pytest.raises(EngineLoadError, match=f"ONNX Runtime {ort.__version__}"),
        load(tmp_path, engine.config),
    ):
        pass
