"""How an engine becomes the active one: walks through the table of `states`, each step on disk first."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.errors import DoesNotFitError
from edgellm.memory import MemoryPlan
from edgellm.v1 import engines_pb2
from edgellm_agent.engine.canary import try_engine
from edgellm_agent.errors import BusyError, PreconditionError, TooLargeError
from edgellm_agent.lifecycle.journal import Journal
from edgellm_agent.lifecycle.library import Library, StoredEngine
from edgellm_agent.lifecycle.rack import Loaded, Rack
from edgellm_agent.lifecycle.states import Event, State
from edgellm_agent.lifecycle.succession import Succession
from edgellm_agent.origin import LOCAL, Origin, PinnedError
from edgellm_agent.registry import Activation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A step of an activation that has been reached; the plan comes once the engine answers."""

    phase: engines_pb2.ActivationPhase.ValueType
    elapsed_s: float
    plan: MemoryPlan | None = None
    probation_s: float = 0.0


OnPhase: TypeAlias = Callable[[Phase], None]


class _Reporter:
    """Tells each phase, and when it was reached."""

    def __init__(self, on_phase: OnPhase) -> None:
        self._on_phase = on_phase
        self._began = time.monotonic()

    def reached(self, name: str, plan: MemoryPlan | None = None, probation_s: float = 0.0) -> None:
        phase = engines_pb2.ActivationPhase.Value(f"ACTIVATION_PHASE_{name}")
        self._on_phase(Phase(phase, time.monotonic() - self._began, plan, probation_s))


class Activator:
    """Brings one engine from the disk to where it answers; if that fails, all is as it was.

    Whoever calls has the turn: one activation at a time.

    Args:
        rack: The engines in memory.
        library: Those on the disk.
        journal: Where each step is written.
        succession: Says what the engine would go back to, and watches it.
        on_stranded: Called when no engine runs any more: the one that did has not come back.
    """

    def __init__(
        self,
        rack: Rack,
        library: Library,
        journal: Journal,
        succession: Succession,
        on_stranded: Callable[[], None],
    ) -> None:
        self._on_stranded = on_stranded
        self._rack = rack
        self._library = library
        self._journal = journal
        self._registry = journal.registry
        self._succession = succession

    async def activate(
        self, stored: StoredEngine, on_phase: OnPhase, by: Origin, may_take: Callable[[], None]
    ) -> None:
        """Makes it the default engine, on probation; raises AgentError or DoesNotFitError.

        `may_take` raises HeldError while no running engine may be taken away.
        """
        tell, digest = _Reporter(on_phase), stored.digest
        self._check_pin(by)
        may_take()
        loaded = self._rack.serving(digest)
        if loaded is not None and loaded is self._rack.default:
            # Told all the same: the fleet may have asked.
            with self._journal.entry("ACTIVATED", digest, by, previous=digest):
                pass
        elif digest == self._registry.active():
            loaded = await self._again(stored, tell)
        else:
            loaded = await self._anew(stored, tell, by, may_take)
        left_s = self._succession.probation_s(digest)
        tell.reached("PROBATION" if left_s else "COMMITTED", loaded.engine.plan, left_s)

    async def activate_beside(self, stored: StoredEngine, on_phase: OnPhase, by: Origin) -> None:
        """Has it answer beside the default engine; raises AgentError or DoesNotFitError."""
        tell, digest = _Reporter(on_phase), stored.digest
        if digest == self._registry.active():
            raise PreconditionError(f"{stored.config.name} is the default engine")
        loaded = self._rack.serving(digest)
        if loaded is None:
            now = Activation(digest, State.VERIFYING, "", True, 0, by.name, by.generation, by.actor)
            loaded = await self._bring_up(stored, now, tell, lambda now: self._put_beside(now, by))
            self._rack.put_beside(loaded)
        tell.reached("COMMITTED", loaded.engine.plan)

    async def take_beside(self, digest: str, by: Origin, error: str = "") -> None:
        """Takes an engine that answers beside the default one out of memory."""
        with self._journal.entry("DEACTIVATED", digest, by, error=error):
            self._registry.set_beside(digest, loaded=False)
        if (loaded := self._rack.beside.get(digest)) is not None:
            await self._rack.take(loaded, at_once=bool(error))

    async def put(self, loaded: Loaded) -> None:
        """The engine is the default one from now on, and watched; what it replaces ends with its requests."""
        replaced = self._rack.put(loaded)
        self._succession.begin_probation(loaded)
        for old in replaced:
            await self._rack.retire(old)

    async def load(self, stored: StoredEngine, on_draining: Callable[[], None] = lambda: None) -> Loaded:
        """Loads an engine to be the default one: what answers beside it makes room if it must."""
        try:
            return await self._rack.load(stored, on_draining=on_draining)
        except (DoesNotFitError, TooLargeError):
            if not self._rack.beside:
                raise
        for digest in list(self._rack.beside):
            await self.take_beside(digest, LOCAL, "its memory is needed for the default engine")
        return await self._rack.load(stored, on_draining=on_draining)

    async def _anew(
        self, stored: StoredEngine, tell: _Reporter, by: Origin, may_take: Callable[[], None]
    ) -> Loaded:
        def draining() -> None:
            may_take()
            tell.reached("DRAINING")

        def answers(now: Activation) -> None:
            # It may have been held, or pinned, since the activation began.
            may_take()
            self._make_active(now, by)

        now = self._succession.candidate(stored.digest, by)
        loaded = await self._bring_up(stored, now, tell, answers, draining)
        await self.put(loaded)
        return loaded

    async def _again(self, stored: StoredEngine, tell: _Reporter) -> Loaded:
        """The active engine, which is not in memory: where it stands does not change by that."""
        if self._rack.default is not None:
            raise BusyError(f"{stored.config.name} is the active engine, and is starting again")
        tell.reached("VERIFYING")
        await self._library.verify(stored)
        tell.reached("LOADING")
        loaded = await self.load(stored)
        tell.reached("CANARY")
        await self.tried(loaded)
        await self.put(loaded)
        return loaded

    async def tried(self, loaded: Loaded) -> None:
        """Has a loaded engine answer for the first time; if it does not, it is not loaded any more."""
        try:
            await try_engine(loaded.engine, loaded.stored.config)
        except BaseException:
            await loaded.engine.close()
            raise

    async def _bring_up(
        self,
        stored: StoredEngine,
        now: Activation,
        tell: _Reporter,
        answers: Callable[[Activation], None],
        draining: Callable[[], None] = lambda: None,
    ) -> Loaded:
        """From the disk to a first answer; `answers` then writes down that it is to answer all."""
        self._registry.set_activation(now)
        there, loaded = self._rack.serving(stored.digest), None
        try:
            tell.reached("VERIFYING")
            await self._library.verify(stored)
            now = self._journal.step(now, Event.DONE)
            tell.reached("LOADING")
            # One that answers beside the default engine is in memory already.
            if there is not None:
                loaded = there
            elif now.beside:
                loaded = await self._rack.load(stored, beside=True)
            else:
                loaded = await self.load(stored, draining)
            now = self._journal.step(now, Event.DONE)
            tell.reached("CANARY")
            await try_engine(loaded.engine, stored.config)
            answers(now)
        except BaseException as error:
            # First what runs, then what is written: the disk may be what has failed.
            if loaded is not None and loaded is not there:
                await loaded.engine.close()
            await self.restore()
            if isinstance(error, Exception):
                self._give_up(now)
            raise
        return loaded

    def _give_up(self, now: Activation) -> None:
        try:
            self._journal.step(now, Event.FAILED)
        except sqlite3.Error as error:
            # The next start finds it cut short, which it was.
            log.error("engine.not_written activation=%s: %s", now.digest, error)

    def _make_active(self, now: Activation, by: Origin) -> None:
        """The pointer moves."""
        self._check_pin(by)
        active = self._registry.active() or ""
        with self._journal.entry("ACTIVATED", now.digest, by, previous=active):
            self._succession.replace_probation()
            self._registry.set_beside(now.digest, loaded=False)
            self._registry.set_active(now.digest)
            self._journal.step(now, Event.DONE)
        self._succession.end_probation("another engine was activated")

    def _put_beside(self, now: Activation, by: Origin) -> None:
        with self._journal.entry("ACTIVATED", now.digest, by, previous=self._registry.active() or ""):
            self._registry.set_beside(now.digest, loaded=True)
            self._journal.step(now, Event.BESIDE)

    async def restore(self) -> None:
        """The default engine back, if it was stopped; if it does not come, others go on trying."""
        if self._succession.leaving:
            return
        try:
            await self._rack.restore()
        except Exception as error:  # noqa: BLE001 - whatever it is, the next try may find it gone
            log.error("engine.does_not_come_back error=%s", error)
        if self._rack.default is None:
            self._on_stranded()
        else:
            self._succession.begin_probation(self._rack.default)

    def _check_pin(self, by: Origin) -> None:
        if by.generation and self._registry.pinned():
            raise PinnedError("the device is pinned to the engine that it has")
