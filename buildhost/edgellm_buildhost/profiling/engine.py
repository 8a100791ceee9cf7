"""An engine of a bundle in ONNX Runtime, with the options and the binding that a device's worker uses."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from packaging.version import Version

from edgellm.bundle import Bundle, EngineConfig, Variant
from edgellm.errors import EdgellmError
from edgellm_buildhost.runner import Runner, runs_here

# As in the worker: the first version whose attention takes rows of several lengths.
_RAGGED_SINCE = Version("1.32")


@dataclass(frozen=True)
class Step:
    """What one run of the session computes: `batch` rows of `tokens`, each behind `context` cached ones."""

    batch: int
    tokens: int
    context: int


@contextmanager
def unpacked(bundle: Bundle, variant: Variant) -> Iterator[Path]:
    """A directory with the engine's files under their titles, which is removed at the end.

    They are links where the file system allows it, since the runtime maps weights from beside the graph.
    """
    beside = bundle.path.parent if os.access(bundle.path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".edgellm-profile.", dir=beside) as name:
        for layer in variant.manifest.layers:
            source, target = bundle.blob_path(layer.digest), Path(name, layer.title)
            try:
                target.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, target)
        yield Path(name)


def graph_title(config: EngineConfig) -> str:
    """The graph that a worker would load on this version of ONNX Runtime."""
    ragged = config.files.graph_ragged
    return ragged if ragged is not None and takes_ragged_rows(config) else config.files.graph


def takes_ragged_rows(config: EngineConfig) -> bool:
    """Whether a step may have several rows of several tokens here."""
    return config.files.graph_ragged is not None and Version(ort.__version__) >= _RAGGED_SINCE


def check_runs(config: EngineConfig, step: Step) -> None:
    """Raises EdgellmError if the engine, or ONNX Runtime as installed here, cannot compute such a step."""
    if config.runtime != "onnxruntime" or config.precision.kv not in {"float32", "int8"}:
        raise EdgellmError(
            f"{config.name} is for {config.runtime} with a {config.precision.kv} cache",
            "only engines for ONNX Runtime with a float32 or int8 cache can be profiled here",
        )
    if not runs_here(config.runtime_requires):
        raise EdgellmError(
            f"{config.name} needs ONNX Runtime {config.runtime_requires}, and {ort.__version__} is installed",
            f"pip install 'onnxruntime{config.runtime_requires}'",
        )
    room = config.model.context_length
    if step.context + step.tokens > room:
        raise EdgellmError(
            f"{step.context} tokens in the cache and {step.tokens} more exceed the context of {room}",
            "give a smaller --context or --prompt",
        )
    if step.batch > 1 and step.tokens > 1 and not takes_ragged_rows(config):
        raise EdgellmError(
            f"ONNX Runtime {ort.__version__} computes one prompt at a time",
            "give --batch 1, or install ONNX Runtime 1.32 or newer",
        )


class LoadedEngine:
    """An engine that repeats one step over the same memory, so that every run does the same work."""

    def __init__(
        self, directory: Path, config: EngineConfig, step: Step, threads: int, trace: Path | None = None
    ) -> None:
        """Load the graph; with `trace`, every node is timed into a file whose name begins so."""
        self._runner = _runner(directory / graph_title(config), step, _options(threads, trace))
        for cache in self._runner.caches.values():
            # Written to, since pages of zeros that nobody wrote are all one page, which no read misses.
            cache.fill(1)
        # Which tokens they are does not matter to the time.
        ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (step.batch, step.tokens))
        logits = np.zeros((step.batch, config.model.vocab_size), np.float32)
        self._step = self._runner.bind(ids, step.context, logits)

    def run(self, times: int) -> list[float]:
        """Seconds of each of so many steps."""
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            self._step.run()
            taken.append(time.perf_counter() - began)
        return taken

    def end_profiling(self) -> Path:
        """Closes the profiler's file."""
        return Path(self._runner.session.end_profiling())


def _options(threads: int, trace: Path | None) -> ort.SessionOptions:
    """As a worker has them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    return options


def _runner(graph: Path, step: Step, options: ort.SessionOptions) -> Runner:
    try:
        return Runner(graph, step.context + step.tokens, rows=step.batch, options=options)
    except Exception as error:
        raise EdgellmError(
            f"ONNX Runtime {ort.__version__} refused the graph: {error}",
            "the bundle may be damaged: `edgellm inspect` checks it",
        ) from error
