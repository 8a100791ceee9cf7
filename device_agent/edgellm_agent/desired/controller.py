"""Makes the device what its fleet desires: takes `desired`, works, and tells `reported`.

What to do is decided by `rules`; here it is done. One task at a time works for one generation.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3

import pydantic

from edgellm.fleet.topics import decode
from edgellm.v1 import fleet_pb2
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.desired import rules
from edgellm_agent.desired.convergence import Convergence
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.events import Happening
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.mqtt.base import Uplink

log = logging.getLogger(__name__)

_MAX_PAYLOAD_BYTES = 64 << 10
_RECENT = 50
_STATE = pydantic.TypeAdapter(rules.State)


class DesiredController:
    """Owns the state and the task that works for it.

    Args:
        settings: Allow-list and how to fetch.
        manager: Whose engines these are; its registry keeps the state, its events tell what happens.
        uplink: To the fleet.
        fleet: What the fleet may do here at all.
    """

    def __init__(
        self, settings: DesiredSettings, manager: EngineManager, uplink: Uplink, fleet: Fleet
    ) -> None:
        self._settings = settings
        self._manager = manager
        self._registry = manager.registry
        self._uplink = uplink
        self._fleet = fleet
        self._state = rules.State()
        self._told: fleet_pb2.Reported | None = None
        self._work: Convergence | None = None
        self._task: asyncio.Task[None] | None = None
        self._next_tick: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def state(self) -> rules.State:
        """What the rules know."""
        return self._state

    def start(self) -> None:
        """Takes up what the last run left, tells it, and listens."""
        self._state = _parse_state(self._registry.desired())
        self._manager.events.listen(self._heard)
        active = self._registry.active() or ""
        proving = self._manager.on_probation(active)
        self._apply(rules.Restarted(active, self._registry.pinned(), proving, self._given_up(active)))
        if self._state.phase in {"PROVING", "CONVERGED"} and not self._manager.library.has(
            self._state.engine
        ):
            # Found, and the last run ended before it was told.
            self._apply(rules.Damaged(self._state.engine))
        self._follow()
        self._uplink.on_message(self._uplink.topics.desired, lambda _topic, payload, _: self.take(payload))

    async def close(self) -> None:
        """Stops working; what was fetched stays for the next run."""
        self._closed = True
        if self._next_tick is not None:
            self._next_tick.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def take(self, payload: bytes) -> None:
        """A payload from the `desired` topic; what nobody could have meant is logged and ignored."""
        if not payload:
            return  # the retained message was removed: nothing is desired that was not desired before
        try:
            if len(payload) > _MAX_PAYLOAD_BYTES:
                raise ValueError(f"{len(payload)} bytes")
            event = decode(payload)
            if not event.HasField("desired"):
                raise ValueError("no `desired` in the event")
            desired = rules.Desired.from_proto(event.desired)
        except ValueError as error:
            log.warning("desired.ignored error=%.300s", error)
            return
        self._apply(desired)

    def report(self) -> fleet_pb2.Reported:
        """What the device runs and how far it is, now."""
        reported = rules.reported(self._state)
        engines = self._manager.engines()
        reported.engines.extend(engine.digest for engine in engines)
        reported.active_name = next((e.config.name for e in engines if e.digest == self._state.active), "")
        if self._work is not None and self._asked(self._work.generation):
            reported.fetched_bytes, reported.total_bytes = self._work.progress()
        return reported

    def publish(self, *, again: bool = False) -> None:
        """Tells the fleet, if there is something new or it is asked for again."""
        reported = self.report()
        if reported == self._told and not again:
            return
        self._told = reported
        event = self._uplink.new_event("reported")
        event.reported.CopyFrom(reported)
        self._uplink.publish_retained(self._uplink.topics.reported, event)

    def _heard(self, happening: Happening) -> None:
        if self._closed or not isinstance(happening, fleet_pb2.EngineChanged):
            return
        active = self._registry.active() or ""
        if happening.what == "ACTIVATED" and happening.engine == active:
            proving = self._manager.on_probation(active)
            self._apply(rules.Activated(active, local=happening.origin == "local", proving=proving))
        elif happening.what == "COMMITTED":
            self._apply(rules.Proven(happening.engine))
        elif happening.what == "ROLLED_BACK" or self._stranded(happening, active):
            self._apply(rules.RolledBack(happening.engine, active, happening.error))
        elif happening.what == "DAMAGED":
            self._apply(rules.Damaged(happening.engine))
        elif happening.what in {"PINNED", "UNPINNED"}:
            self._apply(rules.Pinned(happening.what == "PINNED"))
        else:
            self.publish()

    def _stranded(self, change: fleet_pb2.EngineChanged, active: str) -> bool:
        """Whether the active engine itself has failed, with no other to go back to."""
        failed = change.what == "FAILED" and change.engine == active
        return failed and not self._manager.on_probation(active)

    def _given_up(self, active: str) -> str:
        """Why the engine of the generation was given up, if the last run ended before it could say so."""
        engine = self._state.engine
        if self._state.phase not in {"PROVING", "CONVERGED"}:
            return ""
        if engine == active and (self._manager.on_probation(engine) or engine in self._registry.proven()):
            return ""
        rows = (row.change for row in self._registry.history(_RECENT) if row.change.engine == engine)
        # Without another engine to go back to, it is the active one still.
        last = next(
            (change for change in rows if change.what in {"ACTIVATED", "ROLLED_BACK", "FAILED"}), None
        )
        return "" if last is None or last.what == "ACTIVATED" else last.error

    def _apply(self, happening: rules.Happening) -> None:
        after = rules.step(self._state, happening)
        if after != self._state:
            try:
                self._registry.set_desired(_STATE.dump_json(after).decode())
            except sqlite3.Error:
                log.exception("desired.not_kept generation=%d phase=%s", after.generation, after.phase)
                if isinstance(happening, rules.Desired):
                    return  # what a restart would not know is not acted upon; the broker says it again
            if (after.generation, after.phase) != (self._state.generation, self._state.phase):
                log.info(
                    "desired.%s generation=%d engine=%s error=%s",
                    after.phase.lower(),
                    after.generation,
                    after.engine,
                    after.error,
                )
            self._state = after
            self._follow()
        self.publish()

    def _follow(self) -> None:
        """Starts the work that the state asks for, and stops a fetch that it no longer asks for."""
        if self._closed:
            return
        if self._work is not None and self._task is not None:
            if not self._work.activating and not self._asked(self._work.generation):
                self._task.cancel()
        elif rules.working(self._state):
            generation = self._state.generation
            self._work = Convergence(
                self._settings,
                self._manager,
                self._state,
                tell=self._apply,
                asked=lambda: self._asked(generation),
                fleet=self._fleet,
            )
            self._task = asyncio.create_task(self._work.run(), name=f"desired-{generation}")
            self._task.add_done_callback(self._ended)
            self._tick()

    def _asked(self, generation: int) -> bool:
        return not self._closed and rules.working(self._state) and self._state.generation == generation

    def _ended(self, task: asyncio.Task[None]) -> None:
        work, self._work, self._task = self._work, None, None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("desired.work_failed", exc_info=error)
            if work is not None:
                self._apply(rules.Tried(work.generation, "FAILED", "the agent failed; its log says more"))
        self._follow()

    def _tick(self) -> None:
        """Tells how far a fetch is, now and then."""
        if self._next_tick is not None:
            self._next_tick.cancel()
        if self._work is not None and not self._closed:
            self.publish()
            self._next_tick = asyncio.get_running_loop().call_later(
                self._settings.report_interval_s, self._tick
            )


def _parse_state(text: str | None) -> rules.State:
    if text is None:
        return rules.State()
    try:
        return _STATE.validate_json(text)
    except pydantic.ValidationError:
        log.exception("desired.state_unreadable")
        return rules.State()
