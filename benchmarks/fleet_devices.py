"""Many devices that publish as agents do: the agent's own publisher with its defaults, in a few processes.

Their records are those of `benchmarks.mqtt_bytes`, an Orin Nano under load, one a second in real time; their
outboxes lie in a folder of the caller's. Started by `benchmarks.fleet`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from typing_extensions import Self

from benchmarks.mqtt_bytes import Stream
from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.mqtt.base import Publication
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.mqtt.settings import MqttSettings
from tests.support.fleet_devices import ENGINE

# Each device tells an event so often: far more than a fleet that works.
EVENT_EVERY_S = 10.0
# Devices of one process are started so far apart, and looked at so often.
_STAGGER_S = 0.02
_LOOK_S = 0.05
_READY_S = 120.0
_DRAIN_S = 120.0
# A device begins at some second of its load's first minutes, as those of a fleet do.
_SPREAD_RECORDS = 360


@dataclass
class Told:
    """What devices told their broker."""

    # As published, from `go` on: what is sent again counts again.
    messages: int = 0
    bytes: int = 0
    events: int = 0
    # By id, from the start on.
    telemetry: int = 0
    # Not acknowledged by the broker within the time for it.
    waiting: int = 0
    # When a device was connected again, CLOCK_MONOTONIC, which all processes share.
    connected_s: list[float] = field(default_factory=list)

    def plus(self, other: Told) -> Told:
        """Both together."""
        return Told(
            self.messages + other.messages,
            self.bytes + other.bytes,
            self.events + other.events,
            self.telemetry + other.telemetry,
            self.waiting + other.waiting,
            self.connected_s + other.connected_s,
        )


def wire_bytes(topic: str, payload: bytes) -> int:
    """A PUBLISH of QoS 1 as paho writes it: two lengths, the packet's number, content type; no TCP or TLS."""
    return len(payload) + len(topic.encode()) + 2 + 2 + 1 + 3 + 1 + 3 + len("application/json")


class DeviceProcesses:
    """So many devices, spread over processes; a context."""

    def __init__(self, host: str, port: int, folder: Path, count: int, processes: int) -> None:
        share = -(-count // processes)
        self._commands = [
            [sys.executable, "-m", "benchmarks.fleet_devices", host, str(port), str(folder), str(first),
             str(min(share, count - first))]
            for first in range(0, count, share)
        ]  # fmt: skip
        self._processes: list[subprocess.Popen[str]] = []
        self._stack = ExitStack()

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.pid for process in self._processes]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for command in self._commands:
                process = stack.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                )
                stack.callback(process.kill)
                self._processes.append(process)
            for process in self._processes:
                if self._line(process) != "ready":
                    raise RuntimeError("the devices did not connect")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def go(self) -> None:
        """Counting begins, and events come."""
        for process in self._processes:
            self._say(process, "go")

    def finish(self) -> Told:
        """No more comes; returns once the broker has all of it, or after a while."""
        for process in self._processes:
            self._say(process, "finish")
        told = Told()
        for process in self._processes:
            told = told.plus(Told(**json.loads(self._line(process))))
        return told

    def close(self) -> None:
        """Devices say goodbye."""
        for process in self._processes:
            self._say(process, "close")
        for process in self._processes:
            process.wait(60)

    def _say(self, process: subprocess.Popen[str], word: str) -> None:
        assert process.stdin is not None
        print(word, file=process.stdin, flush=True)

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()


# In the process of the devices.


class _LiveStream(Stream):
    """The synthetic records in real time."""

    def __init__(self, number: int) -> None:
        super().__init__("busy", 0, seed=number)
        self._first = number * 37 % _SPREAD_RECORDS
        self._phase_s = number * 0.618 % 1
        self.ended = False

    async def records(self, interval_s: float = 1.0) -> AsyncIterator[telemetry_pb2.Telemetry]:
        """One each interval, at a moment of its own."""
        await asyncio.sleep(self._phase_s * interval_s)
        loop = asyncio.get_running_loop()
        sequence, next_s = 0, loop.time()
        while not self.ended:
            sequence, next_s = sequence + 1, next_s + interval_s
            # The load's moment is the device's own; the number counts from its start.
            record = self.record(self._first + sequence)
            record.sequence = sequence
            record.monotonic_ns = time.monotonic_ns()
            record.time.FromNanoseconds(time.time_ns())
            yield record
            await asyncio.sleep(max(0.0, next_s - loop.time()))


class _Device:
    """One publisher, and what it told."""

    def __init__(self, settings: MqttSettings, number: int, folder: Path) -> None:
        self._number = number
        self._stream = _LiveStream(number)
        folder = folder / f"{number:03}"
        folder.mkdir(parents=True)
        self.publisher = MqttPublisher(
            settings,
            self._stream,
            device=f"jetson-{number:03}",
            state_dir=folder,
            agent_version="0.1.0",
            profile="orin-nano-8gb",
            active_engine=ENGINE,
        )
        self.told = Told()
        self._telemetry: set[bytes] = set()
        self._was_connected = True
        self._publish = self.publisher._connection.publish  # noqa: SLF001
        self.publisher._connection.publish = self._counted  # type: ignore[method-assign]  # noqa: SLF001
        self.publisher._catch_up._publish = self._counted  # noqa: SLF001

    @property
    def waiting(self) -> int:
        """Messages that the broker has not acknowledged."""
        part = self.publisher.part()
        return part.queued_events + part.queued_telemetry + len(self.publisher._live)  # noqa: SLF001

    def begin(self) -> None:
        """Count from now on."""
        self.told = Told(telemetry=len(self._telemetry))

    def look(self) -> None:
        """Notice a connection that is new."""
        connected = self.publisher.connected
        if connected and not self._was_connected:
            self.told.connected_s.append(time.monotonic())
        self._was_connected = connected

    def end_telemetry(self) -> None:
        """No more records."""
        self._stream.ended = True

    async def tell_events(self) -> None:
        """A crash each ten seconds, at a moment of its own."""
        await asyncio.sleep(self._number * 0.618 % 1 * EVENT_EVERY_S)
        # Ends by being cancelled.
        while True:
            self.told.events += 1
            self.publisher.happened(
                fleet_pb2.WorkerEnded(engine=ENGINE, reason="signal 9", restarts_total=self.told.events)
            )
            await asyncio.sleep(EVENT_EVERY_S)

    def _counted(self, message: Publication, done: object = None) -> bool:
        taken: bool = self._publish(message, done)  # type: ignore[arg-type]
        if taken:
            self.told.messages += 1
            self.told.bytes += wire_bytes(message.topic, message.payload)
            if "/tele/" in message.topic:
                # The id; what is sent again after an outage counts once.
                self._telemetry.add(message.payload[:64].split(b'"')[3])
                self.told.telemetry = len(self._telemetry)
        return taken


async def _live(host: str, port: int, folder: Path, first: int, count: int) -> None:
    lines = _stdin_lines()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        devices = []
        for number in range(first, first + count):
            settings = MqttSettings(host=host, port=port, group=f"line-{number % 10}")
            device = _Device(settings, number, folder)
            device.publisher.start()
            stack.push_async_callback(device.publisher.close)
            devices.append(device)
            await asyncio.sleep(_STAGGER_S)
        until_s = loop.time() + _READY_S
        while not all(device.publisher.connected for device in devices):
            if loop.time() > until_s:
                raise RuntimeError("not all devices connect")
            await asyncio.sleep(_LOOK_S)
        print("ready", flush=True)
        await _expect(lines, "go")
        looking = asyncio.create_task(_look(devices))
        telling = _begin(devices)
        await _expect(lines, "finish")
        await _end([*telling])
        told = await _drained(devices)
        await _end([looking])
        print(json.dumps(asdict(told)), flush=True)
        await _expect(lines, "close")


def _begin(devices: Sequence[_Device]) -> list[asyncio.Task[None]]:
    for device in devices:
        device.begin()
    return [asyncio.create_task(device.tell_events()) for device in devices]


async def _drained(devices: Sequence[_Device]) -> Told:
    for device in devices:
        device.end_telemetry()
    loop = asyncio.get_running_loop()
    until_s = loop.time() + _DRAIN_S
    while any(device.waiting for device in devices) and loop.time() < until_s:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)
    told = Told()
    for device in devices:
        device.told.waiting = device.waiting
        told = told.plus(device.told)
    return told


async def _look(devices: Sequence[_Device]) -> None:
    while True:
        for device in devices:
            device.look()
        await asyncio.sleep(_LOOK_S)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _stdin_lines() -> asyncio.Queue[str]:
    """What the parent says, and nothing once it is gone."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    asyncio.get_running_loop().add_reader(sys.stdin, lambda: lines.put_nowait(sys.stdin.readline().strip()))
    return lines


async def _expect(lines: asyncio.Queue[str], word: str) -> None:
    if await lines.get() != word:
        raise SystemExit(f"the benchmark is gone while its devices wait for {word!r}")


def main() -> None:
    """Run devices until standard input says "close"."""
    host, port, folder, first, count = sys.argv[1:]
    # Hundreds say the same of a broker that is restarted.
    logging.disable(logging.WARNING)
    # A device has a socket, a database with its log, and paho's pair of sockets.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_live(host, int(port), Path(folder), int(first), int(count)))


if __name__ == "__main__":
    main()
