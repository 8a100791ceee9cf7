"""The life of an engine on this device: pushed, committed, activated, removed.

Activation is atomic: the pointer to the active engine moves only after the new one has loaded and answered.
Until then, and whenever that fails, the old engine is the active one, also after a power cut.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import Descriptor, EngineManifest
from edgellm.errors import BundleError, DoesNotFitError
from edgellm.memory import MemoryPlan
from edgellm.v1 import engines_pb2, telemetry_pb2
from edgellm_agent.engine.canary import try_engine
from edgellm_agent.engine.figures import Totals
from edgellm_agent.engine.pressure import read_pressure
from edgellm_agent.engine.supervisor import EngineSpec, Serving, SupervisedEngine
from edgellm_agent.engine.target import check_target
from edgellm_agent.errors import (
    AgentError,
    BusyError,
    EngineError,
    NotFoundError,
    PreconditionError,
    TooLargeError,
)
from edgellm_agent.events import Events
from edgellm_agent.memory import MemoryPolicy
from edgellm_agent.origin import LOCAL, Origin, PinnedError, tell_change
from edgellm_agent.registry import EngineRow, Registry
from edgellm_agent.store import Store

log = logging.getLogger(__name__)

_Reached = Callable[..., None]

_FORGET_PUSH_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class StoredEngine:
    """An engine in the store."""

    digest: str
    manifest: EngineManifest
    config: EngineConfig
    added_at: float


@dataclass(frozen=True)
class Phase:
    """A step of an activation that has been reached; the plan comes with the last one."""

    phase: engines_pb2.ActivationPhase.ValueType
    elapsed_s: float
    plan: MemoryPlan | None = None


@dataclass(frozen=True)
class Policy:
    """How engines are run here."""

    memory: MemoryPolicy
    runtimes: Mapping[str, str]
    """Runtime name → version."""
    architecture: str
    serving: Serving = field(default_factory=Serving)
    drain_s: float = 30.0


@dataclass
class _Active:
    stored: StoredEngine
    engine: SupervisedEngine


@dataclass
class EngineManager:
    """Owns store, registry and the running engine."""

    store: Store
    registry: Registry
    policy: Policy
    on_change: Callable[[], None] = lambda: None
    events: Events = field(default_factory=Events)
    totals: Totals = field(default_factory=Totals, init=False)
    """Of all engines since the start."""
    _active: _Active | None = field(default=None, init=False)
    _leaving: bool = field(default=False, init=False)
    _activating: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    async def start(self) -> None:
        """Clears what a crash left behind and loads the active engine.

        If it does not load, the agent runs without one.
        """
        self.forget_old_pushes()
        digest = self.registry.active()
        if digest is None:
            return
        try:
            await self.activate(digest, by=None)
        except (AgentError, DoesNotFitError) as error:
            log.error("the active engine %s does not start: %s", digest, error)

    def forget_old_pushes(self) -> None:
        """Drops what has come of engines that nobody went on with for a week, so that others have room."""
        self.registry.forget_pushes_before(time.time() - _FORGET_PUSH_S)
        self._collect()

    def leave(self) -> None:
        """The agent is about to end: an activation that is cut short does not load the old engine again."""
        self._leaving = True

    async def close(self) -> None:
        """Drains and ends the running engine."""
        if self._active is not None:
            await self._active.engine.drain(self.policy.drain_s)
            await self._active.engine.close()
        self.registry.close()

    @property
    def running(self) -> SupervisedEngine | None:
        """The engine that answers, if there is one."""
        return None if self._active is None else self._active.engine

    def runtime(self) -> telemetry_pb2.Runtime:
        """The engine's part of a telemetry record; the totals stay when there is none."""
        if self._active is not None:
            return self._active.engine.runtime()
        record = telemetry_pb2.Runtime(state="none")
        self.totals.fill(record)
        return record

    def engine_for(self, model: str) -> SupervisedEngine:
        """The engine for a request; `model` is a name, a digest, or empty for the active one."""
        if self._active is None:
            raise PreconditionError("no engine is active on this device; push one with `edgellm push engine`")
        stored = self._active.stored
        if model not in ("", stored.config.name, stored.digest):
            raise PreconditionError(f"the active engine is {stored.config.name}, not {model}")
        return self._active.engine

    def prepare(self, manifest: EngineManifest, config: EngineConfig) -> MemoryPlan:
        """Checks that the engine can run here.

        Raises PreconditionError or DoesNotFitError, or TooLargeError for the disk.
        """
        self._check_target(config)
        plan = self.plan_for(config)
        needed = sum(blob.size_bytes - offset for blob, offset in self.store.missing(manifest.blobs()))
        free = self.store.free_bytes()
        if needed > free:
            raise TooLargeError(
                f"{needed:,} bytes are missing, {free:,} are free on the device's disk", needed, free
            )
        return plan

    def begin_push(self, manifest: EngineManifest, config: EngineConfig) -> None:
        """Registers a push; from now on the garbage collector leaves its blobs alone."""
        self.store.put(manifest.to_json())
        self.registry.begin_push(manifest.digest, config.name, time.time())
        self.store.put(config.to_json())

    def commit_push(self, digest: str, by: Origin = LOCAL) -> StoredEngine:
        """Registers the engine as whole; raises NotFoundError or PreconditionError when it is not."""
        if digest not in {row.digest for row in self.registry.engines()}:
            raise NotFoundError(f"no push of {digest} was prepared")
        manifest = EngineManifest.parse(self.store.read(digest))
        missing = self.store.missing(manifest.blobs())
        if missing:
            raise PreconditionError(f"{len(missing)} blobs of {digest} are missing; go on with the push")
        self.registry.end_push(digest, time.time())
        tell_change(self.events, "FETCHED" if by.generation else "PUSHED", digest, by)
        return self.find(digest)

    def engines(self) -> list[StoredEngine]:
        """The engines that are whole, oldest first; one that can no longer be read is left out."""
        return [e for row in self.registry.engines() if row.ready and (e := self._stored(row))]

    def active_digest(self) -> str | None:
        """Digest of the engine that is active, also while it cannot run."""
        return self.registry.active()

    def find(self, name: str) -> StoredEngine:
        """An engine by digest, or by a name that only one has; raises NotFoundError or PreconditionError."""
        found = [e for e in self.engines() if name in (e.digest, e.config.name)]
        if not found:
            raise NotFoundError(
                f"no engine {name!r} on this device; `edgellm engine list` shows what there is"
            )
        if len(found) > 1:
            raise PreconditionError(f"{len(found)} engines are named {name!r}; use the digest")
        return found[0]

    def remove(self, name: str, by: Origin = LOCAL) -> int:
        """Removes an engine that is not active; returns the bytes that came free."""
        stored = self.find(name)
        if stored.digest == self.registry.active():
            raise PreconditionError(f"{stored.config.name} is active; activate another engine first")
        if self._activating.locked():
            raise BusyError("an activation is under way")
        self.registry.remove(stored.digest)
        tell_change(self.events, "REMOVED", stored.digest, by)
        return self._collect()

    def pin(self, pinned: bool) -> None:
        """Keeps the active engine, whatever the fleet desires and also from now on tries; or ends that."""
        if pinned != self.registry.pinned():
            self.registry.set_pinned(pinned)
            tell_change(self.events, "PINNED" if pinned else "UNPINNED", self.registry.active() or "", LOCAL)

    async def restart(self) -> None:
        """Ends the running engine, once its requests have ended, and starts it from a fresh memory plan.

        Raises BusyError, PreconditionError, or EngineError if it does not come back.
        """
        if self._activating.locked():
            raise BusyError("an activation is under way")
        async with self._activating:
            if self._active is None:
                raise PreconditionError("no engine is running")
            await self._retire(self._active)
            await self._reload()
            if self._active is None:
                raise EngineError("the engine does not come back; the agent's log says why")

    async def idle(self) -> None:
        """Returns once no activation is under way."""
        async with self._activating:
            pass

    def available_bytes(self) -> int:
        """Memory that an engine beside the running one could have now."""
        engine = self.running
        return self.policy.memory.available_bytes(*(engine.memory_bytes() if engine is not None else (0, 0)))

    def plan_for(self, config: EngineConfig) -> MemoryPlan:
        """How an engine would fit if it were the only one; raises DoesNotFitError."""
        resident, _ = self.running.memory_bytes() if self.running is not None else (0, 0)
        memory = self.policy.memory
        return memory.plan(config, memory.available_in_place_of(resident))

    def expected_blob(self, digest: str, size_bytes: int) -> Descriptor:
        """A blob of an engine that is here or on its way; others would fill the disk unasked.

        Raises PreconditionError.
        """
        for row in self.registry.engines():
            manifest = self._manifest(row.digest)
            if manifest and any((b.digest, b.size_bytes) == (digest, size_bytes) for b in manifest.blobs()):
                return Descriptor("", digest, size_bytes)
        raise PreconditionError(
            f"no engine here, and no prepared push, has a blob {digest} of {size_bytes} bytes"
        )

    async def activate(
        self, name: str, on_phase: Callable[[Phase], None] = lambda _: None, by: Origin | None = LOCAL
    ) -> None:
        """Verifies, loads and tries an engine, then makes it the active one.

        On an error the device stays with the old one. `by` is None where nobody asked, as at the start.
        """
        if self._activating.locked():
            raise BusyError("another activation is under way")
        async with self._activating:
            began = time.monotonic()

            def reached(phase: engines_pb2.ActivationPhase.ValueType, plan: MemoryPlan | None = None) -> None:
                on_phase(Phase(phase, time.monotonic() - began, plan))

            stored = self.find(name)
            try:
                await self._activate(stored, reached, by)
            except PinnedError:
                raise  # nothing is wrong with the engine
            except (AgentError, DoesNotFitError) as error:
                active = self.registry.active() or ""
                tell_change(self.events, "FAILED", stored.digest, by, previous=active, error=str(error))
                raise

    async def _activate(self, stored: StoredEngine, reached: _Reached, by: Origin | None) -> None:
        self._check_target(stored.config)
        self._check_pin(by)
        serving = self._serving(stored)
        if serving is not None:
            tell_change(self.events, "ACTIVATED", stored.digest, by, previous=stored.digest)
            reached(engines_pb2.ACTIVATION_PHASE_COMMITTED, serving.plan)
            return
        reached(engines_pb2.ACTIVATION_PHASE_VERIFYING)
        await asyncio.to_thread(self.store.verify, stored.manifest)
        reached(engines_pb2.ACTIVATION_PHASE_LOADING)
        engine = await self._load(stored)
        try:
            reached(engines_pb2.ACTIVATION_PHASE_CANARY)
            await try_engine(engine)
            self._commit(stored, by)
        except BaseException:
            await engine.close()
            await self._reload()
            raise
        old, self._active = self._active, _Active(stored, engine)
        self.on_change()
        if old is not None:
            await self._retire(old)
        reached(engines_pb2.ACTIVATION_PHASE_COMMITTED, engine.plan)

    def _check_pin(self, by: Origin | None) -> None:
        if by is not None and by.generation and self.registry.pinned():
            raise PinnedError("the device is pinned to the engine that it has")

    def _commit(self, stored: StoredEngine, by: Origin | None) -> None:
        """Moves the pointer, unless the device was pinned meanwhile and this is its fleet's wish."""
        self._check_pin(by)
        previous = self.registry.active() or ""
        self.registry.set_active(stored.digest)
        tell_change(self.events, "ACTIVATED", stored.digest, by, previous=previous)

    def _serving(self, stored: StoredEngine) -> SupervisedEngine | None:
        """The running engine, if it is this one and answers."""
        if self._active is None or self._active.stored.digest != stored.digest:
            return None
        return self._active.engine if self._active.engine.state == "serving" else None

    async def _load(self, stored: StoredEngine) -> SupervisedEngine:
        """Beside the old engine if memory allows, else in its place."""
        running = self.running
        if running is not None:
            try:
                beside = self._supervised(stored, beside=running)
                await beside.start()
            except (DoesNotFitError, TooLargeError):
                log.info("not enough memory for two engines: %s is stopped first", running.spec.config.name)
                await running.drain(self.policy.drain_s)
                await running.close()
            else:
                return beside
        engine = self._supervised(stored, beside=None)
        try:
            await engine.start()
        except BaseException:
            await self._reload()
            raise
        return engine

    def _changed(self) -> None:
        # Asked each time: the daemon says only after its start who wants to know.
        self.on_change()

    async def _reload(self) -> None:
        """Brings the old engine back if it was stopped for a new one that failed."""
        if self._leaving or self._active is None or self._active.engine.state != "stopped":
            return
        try:
            engine = self._supervised(self._active.stored, beside=None)
            await engine.start()
            self._active.engine = engine
        except (AgentError, DoesNotFitError) as error:
            log.error("the old engine does not come back: %s", error)
            self._active = None
        self.on_change()

    async def _retire(self, old: _Active) -> None:
        if old.engine.state != "stopped":
            await old.engine.drain(self.policy.drain_s)
            await old.engine.close()

    def _supervised(self, stored: StoredEngine, beside: SupervisedEngine | None) -> SupervisedEngine:
        policy = self.policy
        spec = EngineSpec(
            digest=stored.digest,
            directory=self.store.link(stored.manifest),
            config=stored.config,
            serving=policy.serving,
            read_pressure=lambda: read_pressure(policy.memory.root),
        )

        def plan() -> MemoryPlan:
            other = beside.memory_bytes() if beside is not None and beside.state != "stopped" else (0, 0)
            return policy.memory.plan(stored.config, policy.memory.available_bytes(*other))

        return SupervisedEngine(
            spec, plan, self._changed, totals=self.totals, on_worker_ended=self.events.tell
        )

    def _check_target(self, config: EngineConfig) -> None:
        policy, sm = self.policy, self.policy.memory.profile.sm
        check_target(config, runtimes=policy.runtimes, architecture=policy.architecture, sm=sm)

    def _stored(self, row: EngineRow) -> StoredEngine | None:
        manifest = self._manifest(row.digest)
        if manifest is None:
            return None
        try:
            config = manifest.parse_config(self.store.read(manifest.config.digest))
        except (AgentError, BundleError) as error:
            log.error("engine %s: %s", row.digest, error)
            return None
        return StoredEngine(row.digest, manifest, config, row.changed_at)

    def _collect(self) -> int:
        freed = self.store.collect(
            [m for row in self.registry.engines() if (m := self._manifest(row.digest))]
        )
        if freed:
            log.info("garbage collection freed %d bytes", freed)
        return freed

    def _manifest(self, digest: str) -> EngineManifest | None:
        try:
            return EngineManifest.parse(self.store.read(digest))
        except (AgentError, BundleError) as error:
            log.error("engine %s: %s", digest, error)
            return None
