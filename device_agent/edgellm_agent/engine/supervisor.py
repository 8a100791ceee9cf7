"""Keeps one engine running: starts its worker, and starts it again, with back-off, when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.bundle.config import EngineConfig
from edgellm.errors import DoesNotFitError
from edgellm.memory import PREFILL_TOKENS, MemoryPlan
from edgellm.v1 import fleet_pb2, inference_pb2, telemetry_pb2, worker_pb2
from edgellm_agent.engine.base import TokenStream
from edgellm_agent.engine.figures import EngineFigures, Health, Totals
from edgellm_agent.engine.pressure import PressureGuard, Reading, read_pressure
from edgellm_agent.engine.restarts import Restarts
from edgellm_agent.engine.worker_process import WorkerProcess
from edgellm_agent.errors import AgentError, UnavailableError

log = logging.getLogger(__name__)

# A KV cache for fewer tokens would refuse nearly everything.
_FLOOR_TOKENS = 1024


@dataclass(frozen=True)
class Serving:
    """How engines are run on this device."""

    threads: int = 0
    prefill_tokens: int = PREFILL_TOKENS
    prefill_budget_s: float = 0.1
    max_waiting: int = 64
    speculate: bool = True
    load_timeout_s: float = 300.0
    poll_s: float = 1.0
    hang_s: float = 30.0
    """A worker that was asked and is silent for so long is killed. Three times the longest step that a slow
    board may take; while the worker rests, waits or loads, this does not apply."""
    loop_deaths: int = 5
    """So many deaths of workers..."""
    loop_window_s: float = 600.0
    """...within so many seconds are a loop."""


@dataclass(frozen=True)
class EngineSpec:
    """What to run, and how."""

    digest: str
    directory: Path
    config: EngineConfig
    serving: Serving = field(default_factory=Serving)
    read_pressure: Callable[[], Reading] = read_pressure


@dataclass(frozen=True)
class Rates:
    """Tokens per second between the last two polls."""

    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """Why no request is taken for now."""

    message: str
    retry_after_s: float


@dataclass(frozen=True)
class Limits:
    """What the governor allows, beside the bound of the KV cache, which memory pressure moves."""

    max_sequences: int | None = None
    """Requests that may run at once; None: as many as were granted."""
    pace: float = 1.0
    """Share of the time in which the worker may compute."""


class SupervisedEngine:
    """An Engine over a worker process that may die.

    Args:
        spec: The engine.
        plan: Plans the memory anew for each start: what is available changes.
        on_change: Called when `state` has changed.
        totals: What all engines of the agent are counted in.
        on_worker_ended: Called when a worker has ended without being asked to.
        on_looping: Called with a reason whenever workers have died `loop_deaths` times within
            `loop_window_s`, starts that failed included. The next start is tried all the same.

    """

    def __init__(
        self,
        spec: EngineSpec,
        plan: Callable[[], MemoryPlan],
        on_change: Callable[[], None] = lambda: None,
        *,
        totals: Totals | None = None,
        on_worker_ended: Callable[[fleet_pb2.WorkerEnded], None] = lambda _: None,
        on_looping: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.spec = spec
        self.state = "starting"
        self._on_change = on_change
        self.totals = totals or Totals()
        self._figures = EngineFigures(self.totals)
        self._restarts = Restarts(spec.serving.loop_deaths, spec.serving.loop_window_s)
        self._on_worker_ended = on_worker_ended
        self._on_looping = on_looping
        self._plan = plan
        self._worker: WorkerProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._last = worker_pb2.Stats()
        self._rates = Rates()
        self._guard: PressureGuard | None = None
        self._limits = Limits()
        self._refusal: Refusal | None = None

    async def start(self) -> None:
        """Loads the engine; raises AgentError or DoesNotFitError, and leaves nothing behind."""
        self._worker = await self._start_worker()
        self._set_state("serving")
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._poll())]

    @property
    def plan(self) -> MemoryPlan:
        """What the running worker was granted."""
        if self._worker is None:
            raise UnavailableError("the engine is not running")
        return MemoryPlan.from_proto(self._worker.ready.plan)

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, if one is running."""
        return None if self._worker is None else self._worker.pid

    def health(self) -> Health:
        """How the engine has fared since its start."""
        return self._figures.health

    def memory_bytes(self) -> tuple[int, int]:
        """What the worker holds, and what it was granted beyond that and has not taken yet."""
        if self._worker is None:
            return 0, 0
        plan, resident = self.plan, self._worker.rss_bytes() or 0
        granted = plan.weights_bytes + plan.workspace_bytes + plan.kv_bytes
        return resident, max(0, granted - resident)

    def submit(
        self, request: inference_pb2.GenerateRequest, deadline_s: float = 0, client: str = ""
    ) -> TokenStream:
        """Starts a request; raises UnavailableError or BusyError."""
        if self._worker is None or self.state != "serving":
            raise UnavailableError(f"the engine is {self.state}")
        if self._refusal is not None:
            raise UnavailableError(self._refusal.message, self._refusal.retry_after_s)
        stream = self._worker.submit(request, deadline_s, client)
        self.totals.requests += 1
        return stream

    def runtime(self) -> telemetry_pb2.Runtime:
        """The engine's part of a telemetry record, as of the last poll."""
        stats = self._last
        record = telemetry_pb2.Runtime(
            state=self.state,
            engine=self.spec.digest,
            prefill_tokens_per_s=self._rates.prefill,
            decode_tokens_per_s=self._rates.decode,
            running_sequences=stats.running_sequences,
            waiting_requests=stats.waiting_requests,
            kv_used_bytes=stats.kv_used_bytes,
            kv_promised_bytes=stats.kv_promised_bytes,
            kv_bound_bytes=stats.kv_bound_bytes,
            kv_cached_bytes=stats.kv_cached_bytes,
        )
        self.totals.fill(record)
        if self._worker is not None:
            record.load_s = self._worker.ready.load_s
            rss = self._worker.rss_bytes()
            if rss is not None:
                record.worker_rss_bytes = rss
        return record

    def limit(self, limits: Limits, refusal: Refusal | None = None) -> None:
        """What holds from now on, also for workers to come; with a refusal, running requests go on."""
        before, self._limits, self._refusal = self._limits, limits, refusal
        if limits != before and self._worker is not None:
            self._set_limits(self._worker)

    async def drain(self, deadline_s: float) -> bool:
        """Takes no new requests and waits for the running ones; tells whether all ended in time."""
        self._set_state("draining")
        return True if self._worker is None else await self._worker.drain(deadline_s)

    async def close(self) -> None:
        """Ends the worker and gives its memory back."""
        self._set_state("stopped")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._worker is not None:
            await self._worker.close()
            self._worker = None

    def _set_state(self, state: str) -> None:
        self.state = state
        self._on_change()

    async def _start_worker(self) -> WorkerProcess:
        spec = self.spec
        load = worker_pb2.Load(
            directory=str(spec.directory),
            config=spec.config.to_json(),
            plan=self._plan().to_proto(),
            threads=spec.serving.threads,
            prefill_tokens=spec.serving.prefill_tokens,
            prefill_budget_s=spec.serving.prefill_budget_s,
            max_waiting=spec.serving.max_waiting,
            speculate=spec.serving.speculate,
        )
        worker = await WorkerProcess.start(
            load, spec.serving.load_timeout_s, self._figures, hang_s=spec.serving.hang_s
        )
        self._guard = self._pressure_guard(MemoryPlan.from_proto(worker.ready.plan))
        self._set_limits(worker)
        log.info("engine %s loaded in %.2f s, worker %d", spec.config.name, worker.ready.load_s, worker.pid)
        return worker

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        # The state is asked too: before Python 3.12, `wait_for` can swallow a cancellation.
        while self._worker is not None and self.state != "stopped":
            began = loop.time()
            await self._worker.dead.wait()
            log.error(
                "worker %d of engine %s died: %s", self._worker.pid, self.spec.config.name, self._worker.death
            )
            self._tell_worker_ended(self._worker)
            if self.state != "draining":
                self._set_state("restarting")
            self._count_death(self._worker.death, loop.time() - began, hung=self._worker.hung)
            await self._worker.close()
            self._worker, self._last = None, worker_pb2.Stats()
            await self._restart()
            if self.state == "restarting":
                self._set_state("serving")

    async def _restart(self) -> None:
        """Starts a worker, however often that takes; an engine that drains needs none any more."""
        while self._worker is None and self.state == "restarting":
            await asyncio.sleep(self._restarts.next_pause_s())
            self.totals.restarts += 1
            try:
                self._worker = await self._start_worker()
            except (AgentError, DoesNotFitError) as error:
                log.error("engine %s does not start: %s", self.spec.config.name, error)
                self._count_death(f"it does not start: {error}")
            except Exception as error:
                # Whatever it is (no memory for a process, say), the next try may find it gone.
                log.exception("engine %s does not start", self.spec.config.name)
                self._count_death(f"it does not start: {type(error).__name__}")

    def _count_death(self, reason: str, lived_s: float = 0.0, *, hung: bool = False) -> None:
        self._figures.died(hung=hung)
        if not self._restarts.died(asyncio.get_running_loop().time(), lived_s):
            return
        serving = self.spec.serving
        deaths = f"{serving.loop_deaths} deaths of its worker within {serving.loop_window_s:g} s"
        what = f"{deaths}, the last: {reason}"
        log.error("engine %s: %s", self.spec.config.name, what)
        try:
            self._on_looping(what)
        except Exception:  # the next start is tried all the same
            log.exception("engine %s: a listener failed", self.spec.config.name)

    async def _poll(self) -> None:
        """Asks the worker for its figures, as often as telemetry wants them."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        while self.state != "stopped":
            await asyncio.sleep(self.spec.serving.poll_s)
            worker = self._worker
            if worker is None:
                self._rates = Rates()
                continue
            before = self._last
            try:
                stats = await worker.stats()
                self._relieve(worker, stats)
            except (AgentError, OSError) as error:
                log.warning("engine %s: %s", self.spec.config.name, error)
                continue
            if worker is not self._worker:
                continue
            self._last, seconds = stats, loop.time() - asked
            asked = loop.time()
            self.totals.add(before, stats)
            self._rates = Rates(
                (stats.prefill_tokens_total - before.prefill_tokens_total) / seconds,
                (stats.generated_tokens_total - before.generated_tokens_total) / seconds,
            )

    def _pressure_guard(self, plan: MemoryPlan) -> PressureGuard:
        return PressureGuard(
            granted_bytes=plan.kv_bytes,
            floor_bytes=min(plan.kv_bytes, _FLOOR_TOKENS * plan.kv_bytes_per_token),
            headroom_bytes=plan.headroom_bytes,
            read=self.spec.read_pressure,
        )

    def _relieve(self, worker: WorkerProcess, stats: worker_pb2.Stats) -> None:
        """Lets the KV cache shrink while others on the board need the memory."""
        if self._guard is None:
            return
        bound = self._guard.update(stats.kv_used_bytes)
        if bound != stats.kv_bound_bytes:
            log.info("KV cache of engine %s: bound %d bytes", self.spec.config.name, bound)
            self._set_limits(worker)

    def _set_limits(self, worker: WorkerProcess) -> None:
        """Tells a worker what it may take: the bound by memory pressure, the rest by the governor."""
        granted, limits = worker.ready.plan, self._limits
        worker.set_limits(
            granted.kv_bytes if self._guard is None else self._guard.bound_bytes,
            min(granted.max_sequences, limits.max_sequences or granted.max_sequences),
            limits.pace,
        )

    def _tell_worker_ended(self, worker: WorkerProcess) -> None:
        ended = fleet_pb2.WorkerEnded(
            engine=self.spec.digest,
            reason=worker.death,
            out_of_memory=worker.out_of_memory,
            restarts_total=self.totals.restarts,
        )
        try:
            self._on_worker_ended(ended)
        except Exception:  # the worker is started again, whoever fails to hear of its end
            log.exception("engine %s: a listener failed", self.spec.config.name)
