"""Measures one engine: the same step with and without ONNX Runtime's profiler, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from edgellm.bundle import Bundle, EngineConfig, Variant
from edgellm.errors import EdgellmError
from edgellm_buildhost.profiling.bandwidth import read_bytes_per_s
from edgellm_buildhost.profiling.engine import LoadedEngine, Step, check_runs, graph_title, unpacked
from edgellm_buildhost.profiling.profile import By, Node, Row, mean_nodes, rows
from edgellm_buildhost.profiling.trace import MAX_EVENTS, Run, middle_half, read_trace
from edgellm_buildhost.profiling.work import NodeWork, kv_bytes, read_work

# The first steps allocate, and bring code and weights into the caches.
_WARM_UP_STEPS = 3

Progress = Callable[[str], None]
"""Told what is done next."""


@dataclass(frozen=True)
class Profile:
    """What was measured, and of what."""

    engine: str
    digest: str
    graph: str
    onnxruntime: str
    threads: int
    step: Step
    steps: int
    step_ms: float
    """Without the profiler; median of the steps."""
    fastest_ms: float
    slowest_ms: float
    """Without the profiler. Far apart, they say that something else ran on this machine."""
    profiled_ms: float
    """With the profiler: of the middle half of the steps by their time, the mean. The nodes are of these."""
    memory_read_gb_s: float
    """What this machine's memory gave to as many threads when nothing else was read."""
    nodes: tuple[Node, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together, without the profiler."""
        return self.step.batch * self.step.tokens / self.step_ms * 1e3

    def rows(self, by: By) -> list[Row]:
        """The profiled step, shared out."""
        return rows(self.nodes, self.profiled_ms, by)


def measure(
    bundle: Bundle, variant: Variant, step: Step, *, threads: int, steps: int, progress: Progress
) -> Profile:
    """Profiles a step of an engine; takes the memory of the loaded engine, and its files stay as they are.

    Nothing is left on the disk, also when it fails or is interrupted. Raises EdgellmError if the engine or
    ONNX Runtime cannot compute such a step, OSError for a disk that cannot be written.
    """
    config = variant.config
    check_runs(config, step)
    progress("memory")
    memory_gb_s = read_bytes_per_s(threads) / 1e9
    with unpacked(bundle, variant) as directory:
        progress("steps")
        plain_ms = _plain_ms(directory, config, step, threads, steps)
        progress("steps with the profiler")
        runs = middle_half(_profiled(directory, config, step, threads, steps))
        work = read_work(directory / graph_title(config))

    def kv_read(todo: NodeWork) -> int:
        per_layer = config.kv_bytes_per_token // config.model.layers
        return kv_bytes(todo, step.batch, step.context + step.tokens, per_layer)

    return Profile(
        engine=config.name,
        digest=variant.digest,
        graph=graph_title(config),
        onnxruntime=str(ort.__version__),
        threads=threads,
        step=step,
        steps=steps,
        step_ms=statistics.median(plain_ms),
        fastest_ms=min(plain_ms),
        slowest_ms=max(plain_ms),
        profiled_ms=statistics.fmean(run.duration_us for run in runs) / 1e3,
        memory_read_gb_s=memory_gb_s,
        nodes=tuple(mean_nodes(runs, work, kv_read)),
    )


def _plain_ms(directory: Path, config: EngineConfig, step: Step, threads: int, steps: int) -> list[float]:
    # In a function of its own: this engine's memory is given back before the next one is loaded.
    engine = LoadedEngine(directory, config, step, threads)
    engine.run(_WARM_UP_STEPS)
    return [taken_s * 1e3 for taken_s in engine.run(steps)]


def _profiled(directory: Path, config: EngineConfig, step: Step, threads: int, steps: int) -> list[Run]:
    engine = LoadedEngine(directory, config, step, threads, directory / "trace")
    engine.run(_WARM_UP_STEPS + steps)
    runs = read_trace(engine.end_profiling())
    if len(runs) != _WARM_UP_STEPS + steps:
        raise EdgellmError(
            f"the profiler kept {len(runs)} of {_WARM_UP_STEPS + steps} steps: "
            f"it keeps {MAX_EVENTS:,} events of nodes and runs",
            "give fewer --steps",
        )
    return runs[_WARM_UP_STEPS:]
