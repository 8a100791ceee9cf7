"""A profile's rows are the step: nothing is counted twice or lost, and nothing is left on the disk."""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from typer.testing import CliRunner

from edgellm.bundle import Bundle, BundleWriter
from edgellm.errors import EdgellmError
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.commands.profile import app
from edgellm_buildhost.profiling import engine as engines
from edgellm_buildhost.profiling import measure as measuring
from edgellm_buildhost.profiling import plots
from edgellm_buildhost.profiling.bandwidth import read_bytes_per_s
from edgellm_buildhost.profiling.engine import LoadedEngine, Step, unpacked
from edgellm_buildhost.profiling.measure import Profile, measure
from edgellm_buildhost.profiling.profile import BETWEEN, By, Row, mean_nodes, rows
from edgellm_buildhost.profiling.trace import NodeTime, Run, middle_half, read_trace
from edgellm_buildhost.profiling.work import NodeWork, kv_bytes, read_work
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_hf

RAGGED = Version(ort.__version__) >= Version("1.32")
ROLES = ("qkv", "attention_out", "gate_up", "down", "head")


def make(directory: Path, precision: QuantName = QuantName.INT8, kv: KvName = KvName.FLOAT32) -> Bundle:
    files = directory / "files"
    files.mkdir(parents=True)
    checkpoint = open_checkpoint(make_tiny_hf(directory / "hf"))
    config = build_engine(checkpoint, precision, files, profile="host", kv=kv, canary=False)
    with BundleWriter(directory / "engine.bundle") as writer:
        writer.add(files, config)
    return Bundle.open(directory / "engine.bundle")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(tmp_path_factory.mktemp("int4"), QuantName.INT4)


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's speed is tried by a test of its own."""
    monkeypatch.setattr(measuring, "read_bytes_per_s", lambda threads: 10e9)


def profile(bundle: Bundle, step: Step, steps: int = 8) -> Profile:
    said: list[str] = []
    return measure(bundle, bundle.variants[0], step, threads=1, steps=steps, progress=said.append)


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["profile", *(str(arg) for arg in args)])


def by_name(found: Profile, by: By = By.OP) -> dict[str, Row]:
    return {row.name: row for row in found.rows(by)}


durations = st.lists(st.lists(st.integers(0, 5000), min_size=3, max_size=3), min_size=1, max_size=9)


class TestRows:
    names = ("layer0.qkv", "layer0.attention", "head")
    kinds = ("MatMulNBits", "GroupQueryAttention", "MatMulNBits")

    @given(durations, st.lists(st.integers(0, 900), min_size=9, max_size=9), st.sampled_from(By))
    def test_add_up_to_the_step_and_their_shares_to_one(self, times, between, by):
        runs = [
            Run(sum(each) + rest + 1, tuple(map(NodeTime, self.names, self.kinds, each, (8, 8, 8))))
            for each, rest in zip(times, between, strict=False)
        ]
        work = {"layer0.qkv": NodeWork(100, 16), "head": NodeWork(300, 16)}
        total_ms = sum(run.duration_us for run in runs) / len(runs) / 1e3
        found = rows(mean_nodes(runs, work, lambda todo: 50), total_ms, by)
        assert sum(row.time_ms for row in found) == pytest.approx(total_ms)
        assert sum(row.share for row in found) == pytest.approx(1)
        assert sum(row.calls for row in found if row.name != BETWEEN) == len(self.names)
        assert sum(row.read_bytes for row in found) == 450
        assert sum(row.operations for row in found) == 2 * 16 * 8
        betweens = [run.duration_us - sum(node.duration_us for node in run.nodes) for run in runs]
        mean_between = sum(betweens) / len(runs) / 1e3
        assert found[-1].name == BETWEEN
        assert found[-1].time_ms == pytest.approx(mean_between)

    @given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50))
    def test_the_middle_half_leaves_out_as_many_fast_as_slow_runs(self, times):
        kept = middle_half([Run(each, ()) for each in times])
        aside = len(times) // 4
        assert sorted(run.duration_us for run in kept) == sorted(times)[aside : len(times) - aside]
        assert len(kept) >= len(times) / 2

    def test_speeds_are_bytes_and_operations_by_time(self):
        row = Row("x", 1, 2.0, 1.0, 4_000_000, 6_000_000)
        assert (row.read_gb_s, row.gop_s) == (2.0, 3.0)
        assert Row("x", 1, 2.0, 1.0, 0, 0).read_gb_s is None

    def test_an_attention_window_bounds_what_is_read_of_the_cache(self):
        assert kv_bytes(NodeWork(), 2, 1000, 16) == 2 * 1000 * 16
        assert kv_bytes(NodeWork(window_tokens=100), 2, 1000, 16) == 2 * 100 * 16
        assert kv_bytes(NodeWork(window_tokens=100), 2, 30, 16) == 2 * 30 * 16


class TestEngine:
    def test_every_matrix_is_a_row_with_the_bytes_that_the_bundle_stores_of_it(self, bundle):
        found = by_name(profile(bundle, Step(1, 1, 16)))
        matrices = [found[f"MatMulNBits {role}"] for role in ROLES]
        assert all(row.read_bytes and row.operations for row in matrices)
        shape = bundle.variants[0].config.model
        qkv_rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        per_layer = 2 * shape.hidden_size * qkv_rows
        # Float minima are two columns more for each group of 32.
        assert found["MatMulNBits qkv"].operations >= shape.layers * per_layer
        assert found["MatMulNBits head"].operations == 2 * shape.hidden_size * shape.vocab_size
        assert found["GroupQueryAttention"].read_bytes == 17 * bundle.variants[0].config.kv_bytes_per_token
        assert found["norms"].calls == 2 * shape.layers + 1

    @pytest.mark.parametrize("by", By)
    def test_its_rows_add_up_to_the_profiled_step(self, bundle, by):
        found = profile(bundle, Step(1, 1, 16))
        table = found.rows(by)
        assert sum(row.time_ms for row in table) == pytest.approx(found.profiled_ms)
        assert all(row.time_ms >= 0 for row in table)
        assert sum(row.calls for row in table) == len(found.nodes) + 1
        assert found.fastest_ms <= found.step_ms <= found.slowest_ms
        assert found.tokens_per_s == pytest.approx(1e3 / found.step_ms)

    def test_a_run_takes_no_longer_than_the_clock_around_it_says(self, bundle):
        with unpacked(bundle, bundle.variants[0]) as folder:
            engine = LoadedEngine(folder, bundle.variants[0].config, Step(1, 1, 16), 1, folder / "trace")
            around_s = engine.run(6)
            runs = read_trace(engine.end_profiling())
        assert len(runs) == len(around_s)
        for run_, wall_s in zip(runs, around_s, strict=True):
            # Whole microseconds, rounded down.
            assert sum(node.duration_us for node in run_.nodes) <= run_.duration_us <= wall_s * 1e6 + 1

    def test_layers_come_in_their_order(self, bundle):
        names = [row.name for row in profile(bundle, Step(1, 1, 16)).rows(By.LAYER)]
        assert [name for name in names if name.startswith("layer")] == ["layer 0", "layer 1"]
        assert {"outside of layers", BETWEEN} < set(names)

    def test_the_work_of_a_prompt_is_that_of_its_tokens_and_of_one_logit(self, bundle):
        one, many = (by_name(profile(bundle, Step(1, tokens, 0))) for tokens in (1, 24))
        qkv, head = "MatMulNBits qkv", "MatMulNBits head"
        assert many[qkv].operations == 24 * one[qkv].operations
        assert many[qkv].read_bytes == one[qkv].read_bytes
        assert many[head].operations == one[head].operations

    def test_rows_side_by_side_are_one_step(self, bundle):
        one, four = (by_name(profile(bundle, Step(batch, 1, 16))) for batch in (1, 4))
        for name in (f"MatMulNBits {role}" for role in ROLES):
            assert four[name].operations == 4 * one[name].operations

    def test_the_graph_is_the_one_that_a_worker_would_load(self, bundle, monkeypatch):
        files = bundle.variants[0].config.files
        assert profile(bundle, Step(1, 1, 4)).graph == (files.graph_ragged if RAGGED else files.graph)
        monkeypatch.setattr(engines, "_RAGGED_SINCE", Version("99"))
        older = profile(bundle, Step(1, 1, 4))
        assert older.graph == files.graph
        assert by_name(older)["MatMulNBits qkv"].read_bytes
        with pytest.raises(EdgellmError, match="one prompt at a time"):
            profile(bundle, Step(2, 8, 0))

    @pytest.mark.skipif(not RAGGED, reason="rows of several lengths need ONNX Runtime 1.32")
    def test_several_prompts_are_one_step_where_the_runtime_allows_it(self, bundle):
        assert by_name(profile(bundle, Step(3, 8, 0)))["MatMulNBits head"].calls == 1

    @pytest.mark.skipif(not RAGGED, reason="an INT8 cache needs ONNX Runtime 1.32")
    def test_an_int8_cache_is_read_with_a_quarter_of_the_bytes(self, bundle, tmp_path):
        small = by_name(profile(make(tmp_path, kv=KvName.INT8), Step(1, 1, 16)))["GroupQueryAttention"]
        large = by_name(profile(bundle, Step(1, 1, 16)))["GroupQueryAttention"]
        assert small.read_bytes * 4 == large.read_bytes

    def test_a_step_beyond_the_context_is_refused(self, bundle):
        with pytest.raises(EdgellmError, match="exceed the context of 2048"):
            profile(bundle, Step(1, 1, 2048))

    def test_an_engine_for_another_runtime_is_refused_with_what_to_install(self, bundle):
        config = bundle.variants[0].config.model_copy(update={"runtime_requires": ">=99"})
        with pytest.raises(EdgellmError) as caught:
            engines.check_runs(config, Step(1, 1, 1))
        assert "onnxruntime>=99" in caught.value.hint

    def test_steps_that_the_profiler_dropped_are_not_made_up(self, bundle, monkeypatch):
        monkeypatch.setattr(measuring, "read_trace", lambda path: read_trace(path)[:-1])
        with pytest.raises(EdgellmError, match="kept 10 of 11 steps"):
            profile(bundle, Step(1, 1, 4))

    def test_the_first_steps_do_not_count(self, bundle, monkeypatch):
        def as_told(path: Path) -> list[Run]:
            return [Run(10**9 if i < 3 else 1000, run.nodes) for i, run in enumerate(read_trace(path))]

        monkeypatch.setattr(measuring, "read_trace", as_told)
        assert profile(bundle, Step(1, 1, 4)).profiled_ms == 1.0

    def test_a_cache_is_memory_that_was_written_to(self, bundle):
        """Reading pages that nobody wrote costs nothing: they are all the one page of zeros."""
        config = bundle.variants[0].config
        with unpacked(bundle, bundle.variants[0]) as folder:
            engine = LoadedEngine(folder, config, Step(1, 1, 16), 1)
        caches = engine._runner.caches.values()
        assert len(caches) == 2 * config.model.layers
        assert all(array.all() for array in caches)

    @pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), None])
    def test_nothing_is_left_on_the_disk(self, bundle, monkeypatch, tmp_path, error):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        before = set(bundle.path.parent.rglob("*"))
        if error is None:
            profile(bundle, Step(1, 1, 4))
        else:

            def failing(path: Path) -> None:
                assert path.is_file()
                raise error

            monkeypatch.setattr(measuring, "read_trace", failing)
            with pytest.raises(type(error)):
                profile(bundle, Step(1, 1, 4))
        assert set(bundle.path.parent.rglob("*")) == before
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_that_nobody_may_write_beside_is_read_from_a_copy(self, bundle, monkeypatch):
        monkeypatch.setattr(engines.os, "access", lambda path, mode: False)

        def refused(self: Path, target: Path) -> None:
            raise OSError("another file system")

        monkeypatch.setattr(Path, "hardlink_to", refused)
        assert profile(bundle, Step(1, 1, 4)).nodes

    def test_the_bytes_of_a_matrix_are_its_codes_and_scales(self, tmp_path):
        bundle = make(tmp_path)
        with unpacked(bundle, bundle.variants[0]) as folder:
            work = read_work(folder / bundle.variants[0].config.files.graph)
        config = bundle.variants[0].config
        head = work["head"]
        groups = config.model.hidden_size // int(re.findall(r"\d+", config.precision.head)[-1])
        assert head.weight_bytes == config.model.vocab_size * (config.model.hidden_size + 4 * groups)


class TestTrace:
    def test_a_file_that_is_no_trace_is_refused(self, tmp_path):
        (tmp_path / "trace.json").write_text("{}")
        with pytest.raises(ValueError, match="not a list"):
            read_trace(tmp_path / "trace.json")

    def test_only_kernels_within_a_run_count(self, tmp_path):
        def event(kind: str, name: str, duration_us: int) -> dict[str, object]:
            return {"cat": kind, "name": name, "dur": duration_us, "args": {"op_name": "Add"}}

        events = [
            event("Session", "session_initialization", 900),
            event("Node", "a_fence_before", 1),
            event("Node", "a_kernel_time", 5),
            event("Session", "SequentialExecutor::Execute", 7),
            event("Session", "model_run", 9),
        ]
        (tmp_path / "trace.json").write_text(json.dumps(events))
        assert read_trace(tmp_path / "trace.json") == [Run(9, (NodeTime("a", "Add", 5, 0),))]


class TestCommand:
    def test_the_json_has_what_the_table_shows(self, bundle):
        result = run(bundle.path, "--steps", 4, "--threads", 1, "--context", 8, "--json")
        assert result.exit_code == 0, result.output
        shown = json.loads(result.stdout)
        assert (shown["digest"], shown["phase"], shown["threads"]) == (bundle.variants[0].digest, "decode", 1)
        assert shown["step"] == {"batch": 1, "tokens": 1, "context": 8}
        assert sum(row["time_ms"] for row in shown["rows"]) == pytest.approx(shown["profiled_ms"])
        assert "nodes" not in shown

    def test_people_get_a_table_and_what_it_is_of(self, bundle):
        options = ("--phase", "prefill", "--prompt", 16, "--steps", 4, "--threads", 1, "--by", "layer")
        result = run(bundle.path, *options)
        assert result.exit_code == 0, result.output
        for text in ("layer 1", BETWEEN, "tokens/s", "1 x 16 tokens behind 0", "10.0 GB/s", ort.__version__):
            assert text in result.stdout

    def test_a_plot_is_an_svg_with_a_bar_for_each_row(self, bundle, tmp_path):
        path = tmp_path / "profile.svg"
        result = run(bundle.path, "--steps", 4, "--threads", 1, "--plot", path)
        assert result.exit_code == 0, result.output
        svg = path.read_text()
        assert svg.lstrip().startswith("<?xml")
        for role in ROLES:
            assert f"MatMulNBits {role}" in svg

    def test_without_matplotlib_the_error_names_the_extra_before_anything_is_measured(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        result = run("nowhere.bundle", "--plot", "x.svg")
        assert isinstance(result.exception, EdgellmError)
        assert "edgellm[bench]" in result.exception.hint


def test_many_rows_are_drawn_as_the_longest_and_one_for_the_others():
    table = [Row(f"row {i}", 1, float(i), 0.01, 10 * i, 0) for i in range(100)]
    shown = plots._shown(table)
    assert len(shown) == 40
    assert shown[-1].name == "(61 others)"
    assert sum(row.time_ms for row in shown) == sum(row.time_ms for row in table)


def test_the_memory_s_speed_is_that_of_all_threads_together(monkeypatch):
    from edgellm_buildhost.profiling import bandwidth

    ticks = iter(range(100))
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: float(next(ticks)))
    assert read_bytes_per_s(2) == 1 << 20
