"""Runs the governor: takes each record, decides, tells the engine, and tells the fleet what has changed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.engine.supervisor import Limits, Refusal
from edgellm_agent.events import Events
from edgellm_agent.governor.observation import Observation, observe
from edgellm_agent.governor.policy import Decision, Governor
from edgellm_agent.governor.power_mode import PowerModes
from edgellm_agent.governor.settings import GovernorSettings
from edgellm_agent.governor.states import State

log = logging.getLogger(__name__)


class Records(Protocol):
    """Where telemetry comes from; the sampler is one."""

    def records(self, interval_s: float = 0.0) -> AsyncIterator[telemetry_pb2.Telemetry]:
        """Every record, as it is taken."""


class Limited(Protocol):
    """What is governed; a supervised engine is one."""

    def limit(self, limits: Limits, refusal: Refusal | None = None) -> None:
        """What holds from now on."""


class GovernorLoop:
    """Owns the governor and its task, from `start` to `close`. Nothing that fails in it ends it.

    Args:
        settings: The operator's.
        source: Gives the records.
        engine: The running engine, if there is one.
        events: Hears of changes.
        max_sequences: Requests that may run at once when all is well.
        headroom_bytes: What the memory plan leaves to others on the board.
        power_modes: Switches the board's power mode, where the operator wants that.
        silence_s: Without a record for so long, the board is taken to be unobserved.
        clock: Monotonic seconds, as the records have them.

    """

    def __init__(
        self,
        settings: GovernorSettings,
        source: Records,
        engine: Callable[[], Limited | None],
        events: Events,
        *,
        max_sequences: int,
        headroom_bytes: int,
        power_modes: PowerModes | None = None,
        silence_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._source = source
        self._engine = engine
        self._events = events
        self._power_modes = power_modes
        self._silence_s = silence_s
        self._clock = clock
        self._governor = Governor(settings, max_sequences, headroom_bytes)
        self._decision = self._governor.decision
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._said_blind = False

    def start(self) -> None:
        """Begins to govern."""
        self._task = asyncio.create_task(self._run(), name="governor")

    async def close(self) -> None:
        """Stops; the engine keeps the limits that it has."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._power_modes is not None:
            await self._power_modes.close()

    def part(self) -> telemetry_pb2.Governor:
        """What holds now, for the next record."""
        return self._decision.to_proto(self._settings.power_budget_mw)

    def apply(self) -> None:
        """Tells the running engine what holds: after each decision, and when another engine runs."""
        decision = self._decision
        refusal = None
        if decision.refusing:
            refusal = Refusal("the device is too hot; it must cool down first", decision.retry_after_s)
        try:
            engine = self._engine()
            if engine is not None:
                engine.limit(Limits(decision.max_sequences, decision.pace), refusal)
        except Exception:  # the next record tries again
            log.exception("governor.apply_failed")

    async def _run(self) -> None:
        # The flag is asked since a task may swallow a cancellation.
        while not self._closed:
            try:
                await self._follow()
            except Exception:  # noqa: PERF203 - one failure is no reason to stop governing
                log.exception("governor.records_failed")
                self._take(self._nothing())
                await asyncio.sleep(self._silence_s)
            else:
                return

    async def _follow(self) -> None:
        """Takes records until there are no more; while none comes, nothing is known of the board."""
        records = self._source.records()
        coming: asyncio.Future[telemetry_pb2.Telemetry] = asyncio.ensure_future(anext(records))
        try:
            # Not `wait_for`: its timeout would end the iterator.
            while not self._closed:
                await asyncio.wait({coming}, timeout=self._silence_s)
                if not coming.done():
                    self._take(self._nothing())
                    continue
                record = coming.result()
                coming = asyncio.ensure_future(anext(records))
                self._take(record)
        except StopAsyncIteration:
            pass
        finally:
            coming.cancel()

    def _nothing(self) -> telemetry_pb2.Telemetry:
        return telemetry_pb2.Telemetry(monotonic_ns=int(self._clock() * 1e9))

    def _take(self, record: telemetry_pb2.Telemetry) -> None:
        before = self._decision
        try:
            seen = observe(record, self._settings.trip_celsius)
            self._say_if_blind(record, seen)
            self._decision = self._governor.update(seen)
        except Exception:
            log.exception("governor.update_failed")
            self._decision = self._careful()
        self.apply()
        now = self._decision
        if (now.state, now.reasons) != (before.state, before.reasons):
            self._tell(before, record)
        if self._power_modes is not None:
            self._power_modes.want(now.state, record.power.mode)

    def _careful(self) -> Decision:
        """What to do when it cannot be told what to do: less with every record, and no more than before."""
        last = self._decision
        return replace(
            last,
            state=max(last.state, State.HOT),
            reasons=last.reasons or ("temperature",),
            pace=max(self._settings.min_pace, last.pace / 2),
        )

    def _tell(self, before: Decision, record: telemetry_pb2.Telemetry) -> None:
        now, thermal, power = self._decision, record.thermal, record.power
        log.log(
            logging.WARNING if now.state > before.state else logging.INFO,
            "governor.changed before=%s now=%s reasons=%s pace=%.2f max_sequences=%d",
            before.state.name,
            now.state.name,
            ",".join(now.reasons) or "none",
            now.pace,
            now.max_sequences,
        )
        changed = fleet_pb2.GovernorChanged(
            before=before.state.name,
            now=self.part(),
            max_celsius=thermal.max_celsius if thermal.HasField("max_celsius") else None,
            margin_celsius=thermal.margin_celsius if thermal.HasField("margin_celsius") else None,
            power_mw=power.total_mw if power.HasField("total_mw") else None,
        )
        self._events.tell(changed)

    def _say_if_blind(self, record: telemetry_pb2.Telemetry, seen: Observation) -> None:
        if record.HasField("thermal") and seen.margin_celsius is None and not self._said_blind:
            self._said_blind = True
            log.warning(
                "governor.temperature_not_governed: the device tells no trip point; set governor.trip_celsius"
            )
