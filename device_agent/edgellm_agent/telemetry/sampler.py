"""Takes one record per interval and keeps the latest for readers that each come at their own pace."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Sequence

from google.protobuf.message import Message

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, Part, PartName, Probe, Source
from edgellm_agent.telemetry.energy import Energy
from edgellm_agent.telemetry.rounding import round_floats

log = logging.getLogger(__name__)


class Sampler:
    """Owns the task that samples, from `start` to `close`; everything is called on one event loop.

    There is no buffer: a reader pulls the latest record, so a slow one misses records and delays nobody.
    A record belongs to all readers: none changes it.
    """

    def __init__(
        self,
        source: Source,
        runtime: Callable[[], telemetry_pb2.Runtime] | None = None,
        *,
        governor: Callable[[], telemetry_pb2.Governor | None] | None = None,
        uplink: Callable[[], telemetry_pb2.Uplink | None] | None = None,
        interval_s: float = 1.0,
        deadline_s: float = 0.5,
        clock: Clock | None = None,
    ) -> None:
        """Prepare to sample.

        `runtime`, `governor` and `uplink` tell what the agent does itself, on the event loop and without
        waiting. A probe that has not answered after `deadline_s` is left out until it does.
        """
        self._source = source
        self._own: dict[str, Callable[[], Message | None] | None] = {
            "runtime": runtime,
            "governor": governor,
            "uplink": uplink,
        }
        self._energy = Energy(interval_s)
        self._interval_ns = round(interval_s * 1e9)
        self._clock = clock or Clock()
        self._reader = _ProbeReader(source.probes, deadline_s)
        self._latest: telemetry_pb2.Telemetry | None = None
        self._sequence = 0
        self._news = asyncio.Event()
        self._closed = False
        self._watching_ended = False
        self._task: asyncio.Task[None] | None = None

    @property
    def latest(self) -> telemetry_pb2.Telemetry | None:
        """The last record; None before the first."""
        return self._latest

    def start(self) -> None:
        """Begin to sample, now and then once per interval."""
        self._task = asyncio.create_task(self._run(), name="telemetry-sampler")
        log.info("telemetry.started source=%s interval_s=%g", self._source.name, self._interval_ns / 1e9)

    async def close(self) -> None:
        """Stop sampling and end all readers; waits for no probe."""
        self._closed = True
        self._wake_readers()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def end_watching(self) -> None:
        """End those who `watch`; the agent's own readers go on."""
        self._watching_ended = True
        self._wake_readers()

    def records(self, interval_s: float = 0.0) -> AsyncGenerator[telemetry_pb2.Telemetry, None]:
        """Give the latest record and then, about every `interval_s`, the one that is latest then.

        Ends when the sampler is closed. An interval below the sampler's gives every record.
        """
        return self._records(interval_s, lambda: self._closed)

    def watch(self, interval_s: float = 0.0) -> AsyncGenerator[telemetry_pb2.Telemetry, None]:
        """Give what `records` gives, for clients of the agent: they are sent away before it ends."""
        return self._records(interval_s, lambda: self._closed or self._watching_ended)

    async def _records(
        self, interval_s: float, ended: Callable[[], bool]
    ) -> AsyncGenerator[telemetry_pb2.Telemetry, None]:
        interval_ns, slack_ns = round(interval_s * 1e9), self._interval_ns // 2
        seen, due_ns = 0, 0
        while not ended():
            news, record = self._news, self._latest
            if record is None or record.sequence == seen or record.monotonic_ns < due_ns - slack_ns:
                await news.wait()
                continue
            due_ns += interval_ns
            if due_ns <= record.monotonic_ns:
                due_ns = record.monotonic_ns + interval_ns
            seen = record.sequence
            yield record

    async def _run(self) -> None:
        due_ns = self._clock.monotonic_ns()
        # Not `while True`: before Python 3.12, `wait_for` can swallow the cancellation by which `close` ends
        # this.
        while not self._closed:
            try:
                self._latest = await self._sample()
            except Exception:  # whatever it is (no memory for a thread, say), the next one may succeed
                log.exception("telemetry.sample_failed sequence=%d", self._sequence)
            self._wake_readers()
            now_ns = self._clock.monotonic_ns()
            due_ns = next_due(due_ns, now_ns, self._interval_ns)
            await self._clock.sleep((due_ns - now_ns) / 1e9)

    def _wake_readers(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _sample(self) -> telemetry_pb2.Telemetry:
        self._sequence += 1
        record = telemetry_pb2.Telemetry(sequence=self._sequence, monotonic_ns=self._clock.monotonic_ns())
        record.time.FromNanoseconds(self._clock.wall_ns())
        for name, part in (await self._reader.read()).items():
            getattr(record, name).CopyFrom(part)
        for own, tell in self._own.items():
            if tell is not None:
                _add(record, own, tell)
        self._energy.fill(record)
        round_floats(record)
        return record


def _add(record: telemetry_pb2.Telemetry, name: str, tell: Callable[[], Message | None]) -> None:
    try:
        if (part := tell()) is not None:
            getattr(record, name).CopyFrom(part)
    except Exception:  # whatever the agent's side does wrong, heat and power are still wanted
        log.exception("telemetry.part_failed part=%s", name)


def next_due(due_ns: int, now_ns: int, interval_ns: int) -> int:
    """Give the next time on the grid of `due_ns` that lies ahead: no drift, and no burst after a stall."""
    return due_ns + max(1, (now_ns - due_ns) // interval_ns + 1) * interval_ns


class _ProbeReader:
    """Reads probes off the event loop and leaves those behind that hang.

    A thread in a read of a wedged sensor cannot be stopped. It is a daemon thread, it is abandoned, and its
    probe is not read again before it comes back; so there is at most one such thread per probe, and the
    agent can still end.
    """

    def __init__(self, probes: Sequence[Probe], deadline_s: float) -> None:
        self._probes = probes
        self._deadline_s = deadline_s
        self._hung: dict[PartName, _Reading] = {}

    async def read(self) -> dict[PartName, Part]:
        """Give the parts that came in time."""
        for name in [name for name, reading in self._hung.items() if not reading.is_alive()]:
            del self._hung[name]
            log.warning("telemetry.probe_back part=%s", name)
        parts: dict[PartName, Part] = {}
        waiting = [probe for probe in self._probes if probe.part not in self._hung]
        while waiting:
            reading = _Reading(waiting)
            reading.start()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reading.ended.wait(), self._deadline_s)
            hung = reading.abandon()
            parts |= reading.parts
            if hung is None:
                break
            self._hung[hung.part] = reading
            log.error("telemetry.probe_hung part=%s deadline_s=%g", hung.part, self._deadline_s)
            waiting = waiting[waiting.index(hung) + 1 :]
        return parts


class _Reading(threading.Thread):
    """One pass over some probes, on a thread of its own."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        super().__init__(name="telemetry-reading", daemon=True)
        self.parts: dict[PartName, Part] = {}
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._probes = probes
        self._at: Probe | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def run(self) -> None:
        for probe in self._probes:
            with self._lock:
                if self._abandoned:
                    return
                self._at = probe
            part = _read(probe)
            with self._lock:
                self._at = None
                if part is not None and not self._abandoned:
                    self.parts[probe.part] = part
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            self._loop.call_soon_threadsafe(self.ended.set)

    def abandon(self) -> Probe | None:
        """Take no more of this thread; gives the probe that it is in, None if it is in none."""
        with self._lock:
            self._abandoned = True
            return self._at


def _read(probe: Probe) -> Part | None:
    try:
        return probe.read()
    except Exception:  # one probe that fails must not take the others along
        log.exception("telemetry.probe_failed part=%s", probe.part)
        return None
