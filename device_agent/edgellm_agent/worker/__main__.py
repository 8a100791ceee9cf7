"""Entry point of the worker process: `python -m edgellm_agent.worker FD`, where FD is its end of the socket
pair.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
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

log = logging.getLogger("edgellm_agent.worker")

_PR_SET_PDEATHSIG = 1
_LOAD_WAIT_S = 60.0
_CACHED_PREFIXES = 8


def main() -> int:
    """Loads one engine and serves it until the agent closes the channel."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _die_with_the_agent()
    _volunteer_for_oom_killer()
    channel = WorkerChannel(socket.socket(fileno=int(sys.argv[1])))
    try:
        first = channel.receive(_LOAD_WAIT_S)
        if not first or first[0].WhichOneof("message") != "load":
            raise ValueError("the first message must be Load")
        loop = _load(first[0].load, channel)
        loop.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        log.exception("worker failed")
        fatal = worker_pb2.Fatal(kind=_kind(error), message=str(error) or type(error).__name__)
        with contextlib.suppress(OSError):
            channel.send(worker_pb2.FromWorker(fatal=fatal))
        return 1
    return 0


def _load(load: worker_pb2.Load, channel: WorkerChannel) -> EngineLoop:
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
        # A runtime is imported only where its engine runs.
        from edgellm_agent.runtimes.onnxruntime import OnnxRuntimeRunner  # noqa: PLC0415

        return OnnxRuntimeRunner()
    raise EngineLoadError(f"this agent has no runtime {config.runtime!r}")


def _kind(error: Exception) -> worker_pb2.FailureKind.ValueType:
    return (
        worker_pb2.FAILURE_KIND_TOO_LARGE
        if isinstance(error, MemoryError)
        else worker_pb2.FAILURE_KIND_INTERNAL
    )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _die_with_the_agent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The agent asks by the channel; a terminal's Ctrl-C is the agent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _volunteer_for_oom_killer() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(main())
