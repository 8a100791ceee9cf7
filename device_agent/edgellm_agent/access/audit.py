"""The audit log: who changed what, or was refused.

A call's record is on disk before the caller is told that it went well. A disk that takes none stops nobody:
a device with a full disk must still let go of an engine. Then the records go to the agent's log, and the
first one that can be written again says how many are missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from edgellm.v1 import device_pb2
from edgellm_agent.access.caller import AGENT, Caller
from edgellm_agent.access.chain import Chain
from edgellm_agent.threads import in_thread

log = logging.getLogger(__name__)

_MAX_WAITING = 1024
_MAX_TEXT = 200
# What a call waits for a disk that hangs.
_LONGEST_WAIT_S = 2.0
# Refusals: whoever tries all day must not push out what else is in the log.
_REFUSALS_AT_ONCE = 30
_REFUSALS_PER_S = 0.2
# Method of the log's own records.
METHOD = "AuditLog"


class AuditLog:
    """Takes records on the event loop and writes them in a thread, several with one sync if need be.

    Args:
        folder: Of the files; in the state directory.
        wall_ns: Wall clock, nanoseconds since 1970.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        folder: Path,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chain = Chain(folder)
        self._wall_ns = wall_ns
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue(_MAX_WAITING)
        self._refusals = _Bucket(_REFUSALS_AT_ONCE, _REFUSALS_PER_S, clock)
        self._lost = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Finds the end of what is there, and says if a power cut tore it."""
        torn = 0
        try:
            torn = await in_thread(self._chain.open)
        except OSError as error:
            log.error("audit.not_opened error=%s", error)
        self._task = asyncio.create_task(self._work(), name="audit")
        if torn:
            log.warning("audit.torn bytes=%d", torn)
            await self.note(AGENT, METHOD, f"{torn} bytes of a torn last line are gone", "DATA_LOSS")

    async def close(self) -> None:
        """Writes what waits, then ends."""
        if self._task is not None:
            task, self._task = self._task, None
            end = _Waiting(None)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._waiting.put(end), _LONGEST_WAIT_S)
                await asyncio.wait([end.done], timeout=_LONGEST_WAIT_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def note(self, caller: Caller, method: str, subject: str, outcome: str) -> None:
        """Writes a record; comes back when it is on disk, or is known not to get there for now.

        Args:
            caller: Who did it.
            method: As in the table of rules.
            subject: What it was about.
            outcome: "OK", or the name of a gRPC status.
        """
        waiting = self._put(self._record(caller.name, str(caller.role), method, subject, outcome))
        # The record is written also when whoever called is gone meanwhile.
        await asyncio.wait([waiting.done], timeout=_LONGEST_WAIT_S)

    def note_refusal(self, name: str, role: str, method: str, outcome: str) -> None:
        """Writes, at some time, that somebody was refused; of very many refusals only how many."""
        unsaid = self._refusals.take()
        if unsaid is not None:
            subject = f"{unsaid} refusals before it were not written" if unsaid else ""
            self._put(self._record(name, role, method, subject, outcome))

    async def last(self, limit: int) -> list[device_pb2.AuditRecord]:
        """The last records, oldest first; raises OSError."""
        return await in_thread(lambda: self._chain.last(limit))

    async def verify(self) -> int:
        """Reads the whole chain; returns its records, or raises DataLossError that says where it breaks."""
        return await in_thread(self._chain.verify)

    def _record(
        self, name: str, role: str, method: str, subject: str, outcome: str
    ) -> device_pb2.AuditRecord:
        record = device_pb2.AuditRecord(
            caller=name[:_MAX_TEXT],
            role=role,
            method=method[:_MAX_TEXT],
            subject=subject[:_MAX_TEXT],
            outcome=outcome,
        )
        record.time.FromNanoseconds(self._wall_ns())
        return record

    def _put(self, record: device_pb2.AuditRecord) -> _Waiting:
        waiting = _Waiting(record)
        try:
            self._waiting.put_nowait(waiting)
        except asyncio.QueueFull:
            self._give_up([waiting], "too many records wait for the disk")
        return waiting

    async def _work(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            if not await self._write(batch):
                return

    async def _write(self, batch: list[_Waiting]) -> bool:
        """Writes a batch; returns False if it was the last one."""
        records = [waiting.record for waiting in batch if waiting.record is not None]
        if self._lost and records:
            gap = f"{self._lost} records could not be written; the agent's log has them"
            records.insert(0, self._record(AGENT.name, str(AGENT.role), METHOD, gap, "DATA_LOSS"))
        try:
            if records:
                await in_thread(lambda: self._chain.append(records))
        except OSError as error:
            self._give_up(batch, str(error))
        else:
            self._lost = 0
            _tell(batch)
        return all(waiting.record is not None for waiting in batch)

    def _give_up(self, batch: list[_Waiting], reason: str) -> None:
        """The agent's log is the next best place."""
        for waiting in batch:
            if (record := waiting.record) is not None:
                self._lost += 1
                log.error(
                    "audit.not_written error=%s caller=%r role=%s method=%s subject=%r outcome=%s",
                    reason,
                    record.caller,
                    record.role,
                    record.method,
                    record.subject,
                    record.outcome,
                )
        _tell(batch)


class _Waiting:
    """A record on its way to the disk; without one, the end."""

    def __init__(self, record: device_pb2.AuditRecord | None) -> None:
        self.record = record
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _tell(batch: list[_Waiting]) -> None:
    for waiting in batch:
        if not waiting.done.done():
            waiting.done.set_result(None)


class _Bucket:
    """So many at once, then so many per second; counts those that had to go without."""

    def __init__(self, size: float, per_s: float, clock: Callable[[], float]) -> None:
        self._size = size
        self._per_s = per_s
        self._clock = clock
        self._tokens = size
        self._filled_at = clock()
        self._without = 0

    def take(self) -> int | None:
        """How many went without since the last one that did not; None for one that goes without."""
        now = self._clock()
        self._tokens = min(self._size, self._tokens + (now - self._filled_at) * self._per_s)
        self._filled_at = now
        if self._tokens < 1:
            self._without += 1
            return None
        self._tokens -= 1
        without, self._without = self._without, 0
        return without
