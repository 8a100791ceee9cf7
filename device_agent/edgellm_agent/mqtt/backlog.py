"""The outbox as the event loop sees it: nothing waits for the disk, and a disk that fails loses no event."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from edgellm.v1 import telemetry_pb2
from edgellm_agent.mqtt.outbox import Message, Outbox, Stored

log = logging.getLogger(__name__)
T = TypeVar("T")

# Telemetry is committed this often, or sooner when there is this much of it: flash wears by the sync and the
# page. A kill loses at most so much.
_COMMIT_S = 30.0
_COMMIT_BYTES = 256 << 10
# Acknowledged messages are deleted this often.
_DELETE_S = 1.0
_RETRY_S = 5.0
# What may wait in memory for a disk that does not do its work.
_MAX_EVENTS = 1000
_MAX_TELEMETRY_BYTES = 1 << 20


class Backlog:
    """Owns the outbox and the task that writes to it, from `start` to `close`.

    Events are committed at once and only then given out by `take`, unless the disk fails: then they are
    given out from memory, in which at most 1000 wait. Telemetry is committed in batches.
    """

    def __init__(self, path: Path, limit_bytes: int, on_stored: Callable[[], None] = lambda: None) -> None:
        """Prepare; `on_stored` is called when there is something new to take."""
        self._outbox = Outbox(path, limit_bytes)
        self._on_stored = on_stored
        # One thread: SQLite is never used by two at once.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="mqtt-outbox")
        # Not committed yet; keys below zero, so that they are told from those of the outbox.
        self._events: dict[int, Message] = {}
        self._telemetry: deque[Message] = deque()
        self._telemetry_bytes = 0
        self._gone: set[int] = set()
        self._next_key = -1
        self._failing = False
        self._dropped = 0
        # How far each kind was given out: events on disk, telemetry on disk, events in memory.
        self._taken_events = self._taken_telemetry = self._taken_memory = 0
        self._full = False
        # When to write next, on the loop's clock, and that this has changed.
        self._due_s = math.inf
        self._changed = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open the outbox and begin to write."""
        self._task = asyncio.create_task(self._run(), name="mqtt-outbox")

    def add_event(self, message: Message) -> None:
        """Take an event for as long as it needs."""
        if len(self._events) >= _MAX_EVENTS:
            log.error("mqtt.event_lost topic=%s waiting=%d", message.topic, len(self._events))
            return
        self._events[self._next_key] = message
        self._next_key -= 1
        self._write_within(0)

    def add_telemetry(self, message: Message) -> None:
        """Take telemetry for as long as there is room."""
        self._telemetry.append(message)
        self._telemetry_bytes += message.size_bytes
        while self._telemetry_bytes > _MAX_TELEMETRY_BYTES:
            self._telemetry_bytes -= self._telemetry.popleft().size_bytes
            self._dropped += 1
        self._write_within(0 if self._telemetry_bytes > _COMMIT_BYTES else _COMMIT_S)

    def rewind(self) -> None:
        """Begin anew: everything that was not forgotten is given out again; commit what is in memory."""
        self._taken_events = self._taken_telemetry = self._taken_memory = 0
        self._write_within(0)

    async def take(self, limit: int) -> list[Stored]:
        """What is to be sent next, events first, each kind in its order; nothing twice before `rewind`."""
        while stored := await self._next(limit):
            for entry in stored:
                self._remember(entry)
            # What the broker has may still be on disk for a second.
            if left := [entry for entry in stored if entry.key not in self._gone]:
                return left
        return []

    def forget(self, key: int) -> None:
        """Drop what the broker has taken."""
        if key < 0:
            self._events.pop(key, None)
        else:
            self._gone.add(key)
            self._write_within(_DELETE_S)

    def fill(self, part: telemetry_pb2.Uplink) -> None:
        """Add how much waits, and what was lost."""
        waiting = self._outbox.waiting
        part.queued_events = waiting.events + len(self._events)
        part.queued_telemetry = waiting.telemetry + len(self._telemetry)
        part.queued_bytes = waiting.bytes
        part.dropped_telemetry_total = self._dropped

    async def close(self, deadline_s: float) -> None:
        """Commit what is in memory and close the file."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(self._task, deadline_s)
        self._disk.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        with self._telling():
            await self._on_disk(self._outbox.open)
            self._on_stored()
        loop = asyncio.get_running_loop()
        # Not `while True`: before Python 3.12, `wait_for` can swallow a cancellation.
        while not self._closing:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, self._due_s - loop.time()))
            self._changed.clear()
            if loop.time() >= self._due_s:
                self._due_s = math.inf
                await self._write()
        await self._write()
        if self._events:
            log.error("mqtt.events_lost events=%d", len(self._events))
        await self._on_disk(self._outbox.close)

    def _write_within(self, delay_s: float) -> None:
        self._due_s = min(self._due_s, asyncio.get_running_loop().time() + delay_s)
        self._changed.set()

    async def _write(self) -> None:
        """Bring the outbox up to what memory knows; what fails is tried again."""
        with self._telling():
            if self._gone:
                await self._delete()
            if self._events or self._telemetry or self._failing:
                await self._commit()
        if self._failing:
            self._write_within(_RETRY_S)
            # What waits in memory is given out meanwhile.
            self._on_stored()

    async def _commit(self) -> None:
        events, telemetry = dict(self._events), list(self._telemetry)
        self._telemetry.clear()
        self._telemetry_bytes = 0
        try:
            dropped = await self._on_disk(lambda: self._outbox.add([*events.values(), *telemetry]))
        except Exception:
            # Old telemetry is not worth the memory that a disk without end to its trouble would ask for.
            self._dropped += len(telemetry)
            raise
        if self._failing:
            self._failing = False
            log.warning("mqtt.outbox_works_again events=%d", len(events))
        if dropped and not self._full:
            log.warning("mqtt.outbox_full bytes=%d", self._outbox.waiting.bytes)
        self._full = dropped > 0
        self._dropped += dropped
        for key in events:
            self._events.pop(key, None)
        self._on_stored()

    async def _delete(self) -> None:
        gone, self._gone = self._gone, set()
        try:
            await self._on_disk(lambda: self._outbox.delete(gone))
        except Exception:
            # Sent again, too, if the agent ends before it succeeds.
            self._gone |= gone
            raise

    async def _next(self, limit: int) -> list[Stored]:
        stored: list[Stored] = []
        with self._telling():
            stored = await self._on_disk(lambda: self._read(limit))
        if not stored and self._failing:
            waiting = [key for key in self._events if key < self._taken_memory]
            stored = [Stored(key, self._events[key]) for key in waiting[:limit]]
        return stored

    def _read(self, limit: int) -> list[Stored]:
        stored = self._outbox.oldest(events=True, after=self._taken_events, limit=limit)
        room = limit - len(stored)
        if room > 0:
            stored += self._outbox.oldest(events=False, after=self._taken_telemetry, limit=room)
        return stored

    def _remember(self, entry: Stored) -> None:
        if entry.key < 0:
            self._taken_memory = entry.key
        elif entry.message.is_event:
            self._taken_events = entry.key
        else:
            self._taken_telemetry = entry.key

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Let a disk that fails be told and tried again, not end the task."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - SQLite's, or that no thread can be had
            self._fails(error)

    def _fails(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.error("mqtt.outbox_fails error=%s", error)
            self._write_within(_RETRY_S)

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)
