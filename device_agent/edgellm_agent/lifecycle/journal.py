"""The history of the engines here: each step is on disk together with what it changed, and then told."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from edgellm.v1 import fleet_pb2
from edgellm_agent.errors import HeldError, PreconditionError
from edgellm_agent.events import Events
from edgellm_agent.lifecycle.states import Event, after
from edgellm_agent.origin import Origin, PinnedError
from edgellm_agent.registry import Activation, Registry

log = logging.getLogger(__name__)


class Journal:
    """Writes the history and tells the fleet."""

    def __init__(self, registry: Registry, events: Events) -> None:
        self.registry = registry
        self._events = events

    @contextmanager
    def entry(
        self, what: str, engine: str, by: Origin, *, previous: str = "", error: str = ""
    ) -> Iterator[None]:
        """What is done in the registry within is on disk together with this entry, or neither is."""
        change = fleet_pb2.EngineChanged(
            what=what,
            engine=engine,
            previous=previous,
            origin=by.name,
            generation=by.generation,
            actor=by.actor,
            error=error,
        )
        with self.registry.together():
            yield
            self.registry.add_history(change)
        self._events.tell(change)

    def failed(self, engine: str, by: Origin, error: Exception) -> None:
        """The device stays with the engine that it has; a pin or a hold is no fault of the new one."""
        active = self.registry.active() or ""
        if isinstance(error, (PinnedError, HeldError)) or engine == active:
            return
        what = "REFUSED" if isinstance(error, PreconditionError) else "FAILED"
        try:
            with self.entry(what, engine, by, previous=active, error=str(error)):
                pass
        except sqlite3.Error as unwritten:
            log.error("engine.not_written what=%s engine=%s: %s", what, engine, unwritten)

    def step(self, now: Activation, event: Event) -> Activation:
        """Where an activation is after an event, by the table; on disk when this returns, or with `entry`."""
        then = replace(now, state=after(now.state, event))
        self.registry.set_activation(then)
        return then
