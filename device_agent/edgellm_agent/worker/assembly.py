"""Puts the parts of a worker together for one engine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from edgellm.bundle.config import EngineConfig
from edgellm.v1 import device_pb2, worker_pb2
from edgellm_agent.ipc import WorkerChannel
from edgellm_agent.runtimes.base import EngineLoadError, LoadPlan, ModelRunner
from edgellm_agent.worker.intake import Intake
from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.paged import PagedKvMemory
from edgellm_agent.worker.kv.pool import KvPool
from edgellm_agent.worker.loop import EngineLoop, LoadedEngine
from edgellm_agent.worker.prefill import PrefillBudget
from edgellm_agent.worker.preparation import Preparation
from edgellm_agent.worker.scheduler import Limits, Scheduler
from edgellm_agent.worker.speculation import StepTimes
from edgellm_agent.worker.stepper import Stepper
from edgellm_agent.worker.structured import Grammars
from edgellm_agent.worker.text import TextModel
from edgellm_agent.worker.waiting import WaitingQueue

_CACHED_PREFIXES = 8


def load_engine(load: worker_pb2.Load, channel: WorkerChannel) -> EngineLoop:
    """Loads the engine, says Ready, and gives the loop that serves it; raises what the loading raises."""
    began = time.monotonic()
    config = EngineConfig.from_json(load.config)
    directory, plan = Path(load.directory), load.plan
    memory = _memory(config, plan)
    pool = KvPool(memory, plan.kv_bytes)
    runner = _runner(config)
    runner.load(LoadPlan(directory, config, memory.spaces, load.threads or _usable_cores()))
    text = TextModel(directory, config)
    grammars = Grammars(text.table, config.model.vocab_size, config.tokens.eos_ids)
    budget = PrefillBudget(load.prefill_budget_s, load.prefill_tokens)
    limits = Limits(
        plan.max_sequences,
        speculate=load.speculate,
        several_multi_token_rows=runner.capabilities().several_multi_token_rows,
    )
    times = StepTimes()
    preparation = Preparation(text, grammars, config, plan.context_tokens, pool.check_fits)
    engine = LoadedEngine(
        plan=plan,
        intake=Intake(preparation.prepare),
        scheduler=Scheduler(pool, WaitingQueue(load.max_waiting), budget, times, limits),
        stepper=Stepper(runner, pool, budget, text.table, times),
    )
    ready = worker_pb2.Ready(
        load_s=time.monotonic() - began,
        plan=plan,
        runtime=device_pb2.RuntimeInfo(name=config.runtime, version=runner.version()),
    )
    channel.send(worker_pb2.FromWorker(ready=ready))
    return EngineLoop(engine, channel)


def _memory(config: EngineConfig, plan: device_pb2.MemoryPlan) -> PagedKvMemory:
    shape = config.model
    geometry = KvGeometry(shape.layers, shape.kv_heads, shape.head_dim, config.kv_item_bytes)
    # As many slots again for finished sequences that may serve as prefixes: they cost addresses, not memory.
    slots = plan.max_sequences + max(plan.max_sequences, _CACHED_PREFIXES)
    return PagedKvMemory(geometry, slots, plan.context_tokens)


def _runner(config: EngineConfig) -> ModelRunner:
    if config.runtime == "onnxruntime":
        # From 1.32 on it would tell its maker how it is used, of which the sandbox leaves but a warning.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        # A runtime is imported only where its engine runs.
        from edgellm_agent.runtimes.onnxruntime import OnnxRuntimeRunner  # noqa: PLC0415

        return OnnxRuntimeRunner()
    raise EngineLoadError(f"this agent has no runtime {config.runtime!r}")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))
