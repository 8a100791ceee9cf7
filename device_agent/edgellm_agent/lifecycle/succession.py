"""Which engine is the active one, whether it has proven itself, and which one comes back if it fails."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgellm_agent.engine.figures import Health
from edgellm_agent.errors import EngineError, UnavailableError
from edgellm_agent.lifecycle.journal import Journal
from edgellm_agent.lifecycle.library import Library, StoredEngine
from edgellm_agent.lifecycle.probation import watch
from edgellm_agent.lifecycle.rack import Loaded
from edgellm_agent.lifecycle.settings import LifecycleSettings
from edgellm_agent.lifecycle.states import Event, State, after
from edgellm_agent.origin import LOCAL, Origin
from edgellm_agent.registry import Activation

log = logging.getLogger(__name__)

_RETRY_S = 5.0


@dataclass(eq=False)
class _Probation:
    """The watch over an active engine that has not proven itself yet."""

    digest: str
    ends_at: float
    """Of the event loop's clock."""
    outcome: asyncio.Future[str]
    """Empty once it is proven, else why it was not."""
    task: asyncio.Task[None] | None = None

    def end(self, outcome: str) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class Succession:
    """Decides who is the active engine after one that fails.

    What it decides is on disk before anything is loaded; `on_failed` then has the active one loaded.

    Args:
        library: The engines that there are.
        journal: Where each decision is written.
        settings: Of the probation.
        on_proven: Called with an engine that has passed.
        on_failed: Called with an engine that does not pass, or no longer works, and why.
    """

    def __init__(
        self,
        library: Library,
        journal: Journal,
        settings: LifecycleSettings,
        on_proven: Callable[[StoredEngine], None],
        on_failed: Callable[[Loaded, str], None],
    ) -> None:
        self.leaving = False
        self._library = library
        self._journal = journal
        self._registry = journal.registry
        self._settings = settings
        self._on_proven = on_proven
        self._on_failed = on_failed
        self._probation: _Probation | None = None

    def leave(self) -> None:
        """The agent is about to end: whoever waits for the end of a probation need not."""
        self.leaving = True
        if self._probation is not None and not self._probation.outcome.done():
            error = UnavailableError("the agent stops; the engine is on probation again when it is back")
            self._probation.outcome.set_exception(error)
            self._probation.outcome.exception()  # whether somebody waits or not

    async def close(self) -> None:
        """Stops watching; the engine on probation is on probation again after the next start."""
        self.leave()
        if self._probation is not None and self._probation.task is not None:
            self._probation.task.cancel()
            await asyncio.gather(self._probation.task, return_exceptions=True)

    def settle(self) -> None:
        """Takes in, at the start of the agent, that its last run has ended, whatever it was doing."""
        for found in self._registry.activations():
            if found.state is State.PROBATION and found.starts >= self._settings.probation_starts:
                self._go_back(found, f"the agent ended {found.starts} times while it was on probation")
                continue
            now = replace(found, state=after(found.state, Event.AGENT_ENDED), starts=found.starts + 1)
            if now.state is State.PROBATION:
                self._registry.set_activation(now)
                continue
            error = f"the agent ended while it was {found.state.value}"
            with self._journal.entry("INTERRUPTED", found.digest, _origin(found), error=error):
                self._registry.set_activation(now)

    def candidate(self, digest: str, by: Origin) -> Activation:
        """An engine about to be activated; it would go back to one that is not itself on probation."""
        active = self._registry.active() or ""
        tried = self.pending(active)
        fallback = tried.fallback if tried is not None else active
        fallback = "" if fallback == digest else fallback
        return Activation(digest, State.VERIFYING, fallback, False, 0, by.name, by.generation, by.actor)

    def pending(self, digest: str) -> Activation | None:
        """The activation of an engine that is on probation."""
        found = (a for a in self._registry.activations() if a.digest == digest)
        return next((a for a in found if a.state is State.PROBATION), None)

    def fallback(self) -> str | None:
        """The engine that the device would go back to from the active one."""
        active = self._registry.active() or ""
        tried = self.pending(active)
        if tried is not None and tried.fallback and self._library.has(tried.fallback):
            return tried.fallback
        return next((d for d in self._registry.proven() if d != active and self._library.has(d)), None)

    # Probation.

    def begin_probation(self, loaded: Loaded) -> None:
        """Watches the active engine, if it has not proven itself."""
        digest = loaded.stored.digest
        if self.pending(digest) is None:
            return
        if not self._settings.probation_s:
            self._commit(loaded)
            return
        loop = asyncio.get_running_loop()
        found = self._running_probation(digest)
        if found is None:
            self.end_probation("it was activated again")
            ends_at = loop.time() + self._settings.probation_s
            found = self._probation = _Probation(digest, ends_at, loop.create_future())
        elif found.task is not None:
            # Loaded anew within its probation, which goes on.
            found.task.cancel()
        found.task = asyncio.create_task(self._prove(found, loaded, loaded.engine.health()), name="probation")

    def replace_probation(self) -> None:
        """Another engine takes the place of the one on probation; within a transaction."""
        for tried in self._registry.activations():
            if tried.state is State.PROBATION:
                self._journal.step(tried, Event.REPLACED)

    def probation_s(self, digest: str) -> float:
        """Seconds until the engine is committed if all goes well; 0 for one that is not on probation."""
        found = self._running_probation(digest)
        return 0.0 if found is None else max(0.001, found.ends_at - asyncio.get_running_loop().time())

    async def settled(self, digest: str) -> None:
        """Waits for the end of an engine's probation; raises EngineError if it did not pass."""
        found = self._running_probation(digest)
        if found is not None and (reason := await asyncio.shield(found.outcome)):
            raise EngineError(reason)

    async def _prove(self, probation: _Probation, loaded: Loaded, before: Health) -> None:
        left_s = probation.ends_at - asyncio.get_running_loop().time()
        reason = await watch(loaded.engine, left_s, before)
        while not self.leaving and not probation.outcome.done():
            if reason:
                self._on_failed(loaded, reason)
                return
            try:
                self._commit(loaded)
            except sqlite3.Error as error:
                log.error("engine.not_committed engine=%s: %s", probation.digest, error)
                await asyncio.sleep(_RETRY_S)

    def _commit(self, loaded: Loaded) -> None:
        tried = self.pending(loaded.stored.digest)
        if tried is None:
            self.end_probation("it is not on probation any more")
            return
        with self._journal.entry("COMMITTED", tried.digest, _origin(tried), previous=tried.fallback):
            self._registry.set_proven(tried.digest)
            self._journal.step(tried, Event.DONE)
        self._on_proven(loaded.stored)
        self.end_probation("")

    def end_probation(self, outcome: str) -> None:
        """The watch is over; whoever waits for it hears why, or nothing if all is well."""
        if self._probation is not None:
            self._probation.end(outcome)

    def _running_probation(self, digest: str) -> _Probation | None:
        found = self._probation
        return found if found is not None and found.digest == digest and not found.outcome.done() else None

    # Going back.

    def fail(self, digest: str, reason: str) -> bool:
        """The active engine does not work; tells whether another one is the active one now."""
        if digest != self._registry.active():
            return False
        tried = self.pending(digest)
        if tried is not None:
            return self._go_back(tried, reason)
        fallback = self.fallback()
        if fallback is None:
            return False
        self._roll_back(digest, fallback, LOCAL, reason)
        return True

    def _go_back(self, tried: Activation, reason: str) -> bool:
        """The engine on probation has failed."""
        fallback, by = self.fallback(), _origin(tried)
        if fallback is None:
            error = f"{reason}; there is no engine to go back to"
            with self._journal.entry("FAILED", tried.digest, by, previous=tried.digest, error=error):
                self._journal.step(tried, Event.STRANDED)
            self.end_probation(error)
            return False
        self._roll_back(tried.digest, fallback, by, reason, tried)
        self.end_probation(f"the device went back to {fallback}: {reason}")
        return True

    def _roll_back(
        self, digest: str, fallback: str, by: Origin, reason: str, tried: Activation | None = None
    ) -> None:
        with self._journal.entry("ROLLED_BACK", digest, by, previous=fallback, error=reason):
            self._registry.set_beside(fallback, loaded=False)
            self._registry.set_active(fallback)
            self._registry.set_unproven(digest)
            if tried is not None:
                self._journal.step(tried, Event.FAILED)
        log.error("engine.rolled_back engine=%s to=%s reason=%s", digest, fallback, reason)


def _origin(tried: Activation) -> Origin:
    return Origin("desired" if tried.origin == "desired" else "local", tried.generation, tried.actor)
