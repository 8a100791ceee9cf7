"""What can be asked of the engines of this device: bring, activate, go back, pin, hold, remove."""

from __future__ import annotations

import asyncio
import functools
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import Descriptor, EngineManifest
from edgellm.errors import DoesNotFitError
from edgellm.memory import MemoryPlan
from edgellm.v1 import telemetry_pb2
from edgellm_agent.engine.figures import Totals
from edgellm_agent.engine.supervisor import SupervisedEngine
from edgellm_agent.engine.target import check_target
from edgellm_agent.errors import AgentError, BusyError, EngineError, PreconditionError
from edgellm_agent.events import Events
from edgellm_agent.lifecycle.activation import Activator, OnPhase
from edgellm_agent.lifecycle.holds import Holds
from edgellm_agent.lifecycle.journal import Journal
from edgellm_agent.lifecycle.library import Library, StoredEngine
from edgellm_agent.lifecycle.rack import Loaded, Policy, Rack
from edgellm_agent.lifecycle.recovery import Recovery
from edgellm_agent.lifecycle.settings import LifecycleSettings
from edgellm_agent.lifecycle.succession import Succession
from edgellm_agent.origin import LOCAL, Origin
from edgellm_agent.registry import HistoryRow, Registry
from edgellm_agent.store import Store
from edgellm_agent.trust.base import Endorsement, Trust, TrustAnyone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """Where an engine on the disk stands."""

    state: str
    """STORED, PROBATION, COMMITTED, UNPROVEN (it failed, and there was none to go back to), or BESIDE."""
    active: bool
    proven: bool
    endorsement: Endorsement


class EngineManager:
    """Owns store, registry and the engines in memory.

    Args:
        store: The blobs.
        registry: What must be remembered.
        policy: How engines are run.
        settings: Of the probation.
        trust: Says whose engines are taken.
        events: Hears of each step.
        on_change: Called when another engine runs, or one is in another state.
    """

    rack_type: ClassVar[type[Rack]] = Rack

    def __init__(
        self,
        store: Store,
        registry: Registry,
        policy: Policy,
        *,
        settings: LifecycleSettings | None = None,
        trust: Trust | None = None,
        events: Events | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.registry = registry
        self.policy = policy
        self.trust = trust or TrustAnyone()
        self.events = events or Events()
        self.on_change = on_change
        self.totals = Totals()
        self.holds = Holds()
        self.journal = Journal(registry, self.events)
        self.library = Library(store, self.journal)
        # Asked each time: the daemon says only after its start who wants to know.
        self.rack = self.rack_type(
            store, policy, self.totals, self.events, on_change=self._changed, on_looping=self._failing
        )
        self._succession = Succession(
            self.library, self.journal, settings or LifecycleSettings(), self._proven, self._failing
        )
        self._activator = Activator(self.rack, self.library, self.journal, self._succession, self._stranded)
        self._turn = asyncio.Lock()
        self._recovery = Recovery(
            self.rack,
            self.library,
            self._activator,
            registry=registry,
            succession=self._succession,
            turn=self._turn,
        )
        self._endorsed: dict[str, Endorsement] = {}

    def _changed(self) -> None:
        self.on_change()

    def _stranded(self) -> None:
        self._recovery.bring_back_soon()

    def _failing(self, loaded: Loaded, reason: str) -> None:
        self._recovery.failing(loaded, reason)

    def settle(self) -> None:
        """Takes in what the end of the last run cut short; before anything is asked of this one."""
        try:
            self.library.forget_old_pushes()
            self._succession.settle()
        except (sqlite3.Error, OSError):
            # What is active is known all the same; the next start settles the rest.
            log.exception("engine.not_settled")

    async def start(self) -> None:
        """Loads the engines that were running.

        Goes on until the active engine runs, or the one before it, or another one was activated.
        """
        await self._recovery.bring_back()

    def leave(self) -> None:
        """The agent is about to end: an activation that is cut short does not load the old engine again."""
        self._succession.leave()
        self.holds.end()

    async def close(self) -> None:
        """Drains and ends the running engines."""
        await self._succession.close()
        await self._recovery.close()
        await self.rack.close()
        self.registry.close()

    # What runs.

    @property
    def running(self) -> SupervisedEngine | None:
        """The default engine, if one is in memory."""
        return None if self.rack.default is None else self.rack.default.engine

    def runtime(self) -> telemetry_pb2.Runtime:
        """The default engine's part of a telemetry record; the totals are of all, and stay without any."""
        if self.running is not None:
            return self.running.runtime()
        record = telemetry_pb2.Runtime(state="none")
        self.totals.fill(record)
        return record

    def engine_for(self, model: str) -> SupervisedEngine:
        """The engine for a request; `model` is a name, a digest, or empty for the default one."""
        loaded = self.rack.all
        if not loaded or (model == "" and self.rack.default is None):
            raise PreconditionError("no engine is active on this device; push one with `edgellm push engine`")
        for each in loaded:
            if model in ("", each.stored.config.name, each.stored.digest):
                return each.engine
        names = ", ".join(each.stored.config.name for each in loaded)
        raise PreconditionError(f"the active engine is {names}, not {model}")

    def available_bytes(self) -> int:
        """Memory that one more engine could have now."""
        return self.rack.available_bytes()

    def plan_for(self, config: EngineConfig) -> MemoryPlan:
        """How an engine would fit if it were the only one; raises DoesNotFitError."""
        return self.rack.plan_alone(config)

    # Bringing engines here.

    def prepare(
        self, manifest: EngineManifest, config: EngineConfig, attestations: Sequence[bytes] = ()
    ) -> MemoryPlan:
        """Checks that the engine may and can run here.

        Raises PreconditionError, which an UntrustedError is too; InvalidError for too many attestations;
        DoesNotFitError; TooLargeError for the disk.
        """
        self._check_target(config)
        self._endorsement(manifest, config, self._kept(manifest, config, attestations))
        plan = self.plan_for(config)
        # Last: what is refused for another reason has nothing reserved.
        self.store.reserve(manifest.blobs())
        return plan

    def begin_push(
        self, manifest: EngineManifest, config: EngineConfig, attestations: Sequence[bytes] = ()
    ) -> None:
        """Registers a push; from now on the garbage collector leaves its blobs alone."""
        self.library.begin(manifest, config, self._kept(manifest, config, attestations))

    def commit_push(self, digest: str, by: Origin = LOCAL) -> StoredEngine:
        """Registers the engine as whole; raises NotFoundError or PreconditionError when it is not."""
        stored = self.library.whole(digest)
        with self.journal.entry("FETCHED" if by.generation else "PUSHED", digest, by):
            self.library.end(digest)
        if any(loaded.stored.digest == digest for loaded in self.rack.all):
            # Brought again since a file was damaged: its next worker must not find the bad one.
            self.store.link(stored.manifest)
        return stored

    def expected_blob(self, digest: str, size_bytes: int) -> Descriptor:
        """A blob of an engine that is here or on its way; raises PreconditionError for others."""
        return self.library.expected_blob(digest, size_bytes)

    # What is here.

    def engines(self) -> list[StoredEngine]:
        """The engines that are whole, oldest first."""
        return self.library.engines()

    def find(self, name: str) -> StoredEngine:
        """An engine by digest, or by a name that only one has; raises NotFoundError or PreconditionError."""
        return self.library.find(name)

    def active_digest(self) -> str | None:
        """Digest of the default engine, also while it cannot run."""
        return self.registry.active()

    def standing(self, stored: StoredEngine) -> Standing:
        """Where an engine stands; who stands for it is judged as of now."""
        digest = stored.digest
        active, proven = digest == self.registry.active(), digest in self.registry.proven()
        state = "BESIDE" if digest in self.registry.beside() else "STORED"
        if active:
            state = "PROBATION" if self.on_probation(digest) else "COMMITTED" if proven else "UNPROVEN"
        try:
            endorsement = self._endorsement_of(stored)
        except PreconditionError:
            endorsement = Endorsement()
        return Standing(state, active, proven, endorsement)

    def on_probation(self, digest: str) -> bool:
        """Whether the engine is active and has not proven itself yet."""
        return self._succession.pending(digest) is not None

    def history(self, limit: int) -> list[HistoryRow]:
        """What happened to the engines here, the latest first."""
        return self.registry.history(limit)

    def needed(self) -> set[str]:
        """Digests that must stay: what runs, and what comes back if the engine on probation fails."""
        fallbacks = (tried.fallback for tried in self.registry.activations())
        return {d for d in (self.registry.active(), *fallbacks, *self.registry.beside()) if d}

    # Changing what runs.

    async def activate(
        self,
        name: str,
        on_phase: OnPhase = lambda _: None,
        by: Origin = LOCAL,
        *,
        beside: bool = False,
        force: bool = False,
    ) -> StoredEngine:
        """Verifies, loads and tries an engine, then has it answer: from then on it is on probation.

        On an error the device stays with the old one. Raises AgentError or DoesNotFitError.
        """
        if self._turn.locked():
            raise BusyError("another activation is under way")
        async with self._turn:
            stored = self.find(name)
            try:
                self._check_target(stored.config)
                self._endorsed[stored.digest] = self._endorsement_of(stored)
                if beside:
                    await self._activator.activate_beside(stored, on_phase, by)
                else:
                    check = functools.partial(self.holds.check, force=force)
                    await self._activator.activate(stored, on_phase, by, check)
            except (AgentError, DoesNotFitError) as error:
                self.journal.failed(stored.digest, by, error)
                raise
            return stored

    async def proven(self, stored: StoredEngine) -> None:
        """Waits until the engine has passed its probation; raises EngineError if it does not pass."""
        await self._succession.settled(stored.digest)

    async def roll_back(
        self, on_phase: OnPhase = lambda _: None, by: Origin = LOCAL, *, force: bool = False
    ) -> StoredEngine:
        """Activates the engine that was proven before the present one; raises as `activate`."""
        fallback = self._succession.fallback()
        if fallback is None:
            raise PreconditionError("there is no engine to go back to: none was committed before this one")
        return await self.activate(fallback, on_phase, by, force=force)

    async def deactivate(self, name: str, by: Origin = LOCAL, *, force: bool = False) -> None:
        """Takes an engine that answers beside the default one out of memory."""
        stored = self.find(name)
        if stored.digest not in self.registry.beside():
            raise PreconditionError(f"{stored.config.name} does not answer beside the default engine")
        async with self._turn:
            self.holds.check(force=force)
            await self._activator.take_beside(stored.digest, by)

    async def restart(self, *, force: bool = False) -> None:
        """Ends the default engine, once its requests have ended, and starts it from a fresh memory plan.

        Raises BusyError, PreconditionError, or EngineError if it does not come back.
        """
        if self._turn.locked():
            raise BusyError("an activation is under way")
        async with self._turn:
            self.holds.check(force=force)
            loaded = self.rack.default
            if loaded is None:
                raise PreconditionError("no engine is running")
            await self.rack.retire(loaded)
            await self._activator.restore()
        if self.rack.default is None:
            raise EngineError("the engine does not come back yet; the agent's log says why")

    async def idle(self) -> None:
        """Returns once no activation is under way."""
        async with self._turn:
            pass

    def remove(self, name: str, by: Origin = LOCAL) -> int:
        """Removes an engine that nothing needs, or what has come of one; returns the bytes that came free."""
        rows = {row.digest: row.name for row in self.registry.engines()}
        # By its digest also one that is not whole, or can no longer be read.
        digest = name if name in rows else self.find(name).digest
        if digest == self.registry.active():
            raise PreconditionError(f"{rows[digest]} is active; activate another engine first")
        if digest in self.registry.beside():
            raise PreconditionError(f"{rows[digest]} answers requests; deactivate it first")
        if self._turn.locked():
            raise BusyError("an activation is under way")
        if digest in self.needed():
            raise PreconditionError(
                f"{rows[digest]} is needed: the device goes back to it if the engine on probation fails"
            )
        with self.journal.entry("REMOVED", digest, by):
            self.registry.remove(digest)
        return self.library.collect()

    def pin(self, pinned: bool, by: Origin = LOCAL) -> None:
        """Keeps the active engine, whatever the fleet desires and also from now on tries; or ends that."""
        if pinned != self.registry.pinned():
            with self.journal.entry("PINNED" if pinned else "UNPINNED", self.registry.active() or "", by):
                self.registry.set_pinned(pinned)

    def _proven(self, stored: StoredEngine) -> None:
        """Older releases of this engine are refused from now on."""
        try:
            # As it was judged when it was activated: a signature may have expired since.
            endorsement = self._endorsed.pop(stored.digest, None)
            if endorsement is None:
                endorsement = self._endorsement_of(stored)
            self.trust.committed(stored.config, endorsement)
        except Exception:
            log.exception("engine.release_not_remembered engine=%s", stored.digest)

    def _kept(self, manifest: EngineManifest, config: EngineConfig, arrived: Sequence[bytes]) -> list[bytes]:
        """What is known of an engine once more has arrived; raises InvalidError for too much at once."""
        return self.trust.retained(manifest, config, self.registry.attestations(manifest.digest), arrived)

    def _endorsement_of(self, stored: StoredEngine) -> Endorsement:
        return self._endorsement(stored.manifest, stored.config, self.registry.attestations(stored.digest))

    def _endorsement(
        self, manifest: EngineManifest, config: EngineConfig, known: Sequence[bytes]
    ) -> Endorsement:
        """Who stands for the engine; raises UntrustedError."""
        proven = manifest.digest in self.registry.proven()
        return self.trust.admit(manifest, config, known, proven=proven)

    def _check_target(self, config: EngineConfig) -> None:
        policy, sm = self.policy, self.policy.memory.profile.sm
        check_target(config, runtimes=policy.runtimes, architecture=policy.architecture, sm=sm)
