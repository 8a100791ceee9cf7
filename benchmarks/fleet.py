"""What a fleet costs its receiver: many simulated devices on one mosquitto, `python -m benchmarks.fleet`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgellm.fleet.queries import FleetReader
from edgellm.fleet.receiver import Receiver
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.topics import Encoding
from edgellm.fleet.validate import Incoming
from scripts.demo_broker import Broker, find_mosquitto
from tests.support.fleet_devices import Message, SimulatedDevice

_ROUND_S = 1.0
_READY_S = 30.0
_SETTLE_S = 3.0
_DRAIN_S = 60.0
# Each device tells an event so often: far more than a fleet that works.
_EVENT_EVERY_ROUNDS = 10
_REPLAY_RECORDS = 300


@dataclass(frozen=True)
class Figures:
    """What one run measured."""

    devices: int
    receivers: int
    encoding: str
    seconds: float
    published: int
    published_per_s: float
    recorded: int
    recorded_per_s: float
    lag_p50_ms: float
    lag_p99_ms: float
    mb_per_device_hour: float
    stored_bytes_per_message: float
    mosquitto_cpu_percent: float
    receiver_cpu_percent: float
    devices_cpu_percent: float
    events_sent: int
    events_lost: int
    events_twice: int
    telemetry_lost: int


class Swarm:
    """All devices in one thread: each publishes one record a second, at a moment of its own."""

    def __init__(self, broker: Broker, count: int, encoding: Encoding) -> None:
        self.devices = [
            SimulatedDevice(
                broker, f"jetson-{n:03}", group=f"line-{n % 10}", encoding=encoding, threaded=False
            )
            for n in range(count)
        ]
        self._selector = selectors.DefaultSelector()
        self.sent = self.sent_bytes = self.events = 0
        for device in self.devices:
            device.connect()
            sock = device.client.socket()
            assert sock is not None
            self._selector.register(sock.fileno(), selectors.EVENT_READ, device)
            self._pump(0)

    def run(self, rounds: int) -> None:
        """Publishes so many records of each device, in real time."""
        began = time.monotonic()
        for number in range(rounds):
            for index, device in enumerate(self.devices):
                self._pump_until(began + (number + index / len(self.devices)) * _ROUND_S)
                messages = device.telemetry()
                if (number + index) % _EVENT_EVERY_ROUNDS == 0:
                    messages += device.events(1)
                    self.events += 1
                self._send(device, messages)

    def burst(self, device: SimulatedDevice, messages: Sequence[Message], window: int) -> None:
        """Publishes as fast as the broker acknowledges, with so many messages on their way."""
        waiting = [info for info in self._send(device, messages[:window]) if info.rc == 0]
        for message in messages[window:]:
            while not waiting[0].is_published():
                self._pump(0.01)
            waiting.pop(0)
            waiting += self._send(device, [message])

    def close(self) -> None:
        """Says goodbye, so that no will is sent."""
        self.settle(1.0)
        for device in self.devices:
            device.client.disconnect()
        self._selector.close()

    def settle(self, seconds: float) -> None:
        """Reads what the broker still has to acknowledge."""
        self._pump_until(time.monotonic() + seconds)

    def _send(self, device: SimulatedDevice, messages: Sequence[Message]) -> list:  # type: ignore[type-arg]
        self.sent += len(messages)
        self.sent_bytes += sum(_wire_bytes(item) for item in messages)
        return device.send(messages)

    def _pump_until(self, moment: float) -> None:
        while (left_s := moment - time.monotonic()) > 0:
            self._pump(min(left_s, 0.05))

    def _pump(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            key.data.client.loop_read()
            if key.data.client.want_write():
                key.data.client.loop_write()


def _wire_bytes(message: Message) -> int:
    """A PUBLISH of QoS 1 as paho writes it: two lengths, the packet's number, content type; no TCP or TLS."""
    return (
        len(message.payload) + len(message.topic.encode()) + 2 + 2 + 1 + 3 + 1 + 3 + len("application/json")
    )


# The receiver's process: counts the time from publishing to the commit.


def receive(url: str, path: Path) -> int:
    """Records until SIGTERM, then prints the lags of what was new, milliseconds."""
    lags: list[float] = []
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def on_recorded(items: Sequence[Incoming]) -> None:
        now_ns = time.time_ns()
        lags.extend((now_ns - item.time_ns) / 1e6 for item in items if item.time_ns and not item.retained)

    receiver = Receiver(BrokerSettings(broker=url), path, on_recorded=on_recorded)
    receiver.start()
    receiver.wait_ready(_READY_S)
    print("ready", flush=True)
    stop.wait()
    receiver.close()
    print(json.dumps(lags), flush=True)
    return 0


@contextlib.contextmanager
def receivers(broker: Broker, path: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """So many receivers of one database, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fleet", "--receive", _url(broker), "--db", str(path)]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the receiver did not start")
            processes.append(process)
        yield processes


def fleet(count: int, seconds: int, receiver_count: int, encoding: Encoding) -> Figures:
    """So many devices at one record a second."""
    with _scratch() as (broker, path), receivers(broker, path, receiver_count) as processes:
        swarm = Swarm(broker, count, encoding)
        pids = [_pid(broker), *(process.pid for process in processes), os.getpid()]
        before, began = [_cpu_s(pid) for pid in pids], time.monotonic()
        swarm.run(seconds)
        elapsed_s = time.monotonic() - began
        cpu = [100 * (_cpu_s(pid) - old) / elapsed_s for pid, old in zip(pids, before, strict=True)]
        swarm.settle(_SETTLE_S)
        _until_recorded(path, swarm.sent)
        recorded, events, stored = _counted(path)
        swarm.close()
        lags = sorted(lag for process in processes for lag in _ended(process))
    return Figures(
        devices=count,
        receivers=receiver_count,
        encoding=encoding,
        seconds=round(elapsed_s, 1),
        published=swarm.sent,
        published_per_s=round(swarm.sent / elapsed_s),
        recorded=recorded,
        recorded_per_s=round(recorded / elapsed_s),
        lag_p50_ms=round(lags[len(lags) // 2], 1),
        lag_p99_ms=round(lags[len(lags) * 99 // 100], 1),
        mb_per_device_hour=round(swarm.sent_bytes / count / elapsed_s * 3600 / 1e6, 2),
        stored_bytes_per_message=round(stored / recorded),
        mosquitto_cpu_percent=round(cpu[0], 1),
        receiver_cpu_percent=round(sum(cpu[1:-1]), 1),
        devices_cpu_percent=round(cpu[-1], 1),
        events_sent=swarm.events,
        events_lost=swarm.events - events,
        events_twice=max(0, events - swarm.events),
        telemetry_lost=swarm.sent - recorded - (swarm.events - events),
    )


def replay(hours: float, encoding: Encoding) -> dict[str, float]:
    """The telemetry of one device that was away for so long, as fast as it is taken."""
    records = round(hours * 3600)
    with _scratch() as (broker, path), receivers(broker, path, 1) as processes:
        swarm = Swarm(broker, 1, encoding)
        (device,) = swarm.devices
        cpu_before, began = _cpu_s(processes[0].pid), time.monotonic()
        for first in range(0, records, _REPLAY_RECORDS):
            swarm.burst(device, device.telemetry(min(_REPLAY_RECORDS, records - first)), window=500)
        while not _recorded_all(path, swarm.sent):
            swarm.settle(0.2)
            if time.monotonic() - began > 900:
                raise RuntimeError("the replay did not end")
        elapsed_s = time.monotonic() - began
        cpu = 100 * (_cpu_s(processes[0].pid) - cpu_before) / elapsed_s
        recorded, _events, stored = _counted(path)
        swarm.close()
        _ended(processes[0])
    return {
        "hours": hours,
        "messages": swarm.sent,
        "recorded": recorded,
        "lost": swarm.sent - recorded,
        "seconds": round(elapsed_s, 1),
        "messages_per_s": round(recorded / elapsed_s),
        "times_real_time": round(hours * 3600 / elapsed_s),
        "receiver_cpu_percent": round(cpu, 1),
        "stored_mb": round(stored / 1e6, 1),
    }


def main() -> int:
    """Prints a table, and JSON with --json."""
    options = _parse()
    if options.receive is not None:
        return receive(options.receive, options.db)
    if find_mosquitto() is None:
        print("mosquitto is not installed", file=sys.stderr)
        return 1
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}", file=sys.stderr
    )
    runs = [fleet(options.devices, options.seconds, count, options.encoding) for count in options.receivers]
    rows: list[dict[str, object]] = [asdict(run) for run in runs]
    for name in Figures.__dataclass_fields__ if rows else ():
        print(f"{name:<26} " + " ".join(f"{row[name]!s:>12}" for row in rows))
    replayed = replay(options.replay_hours, options.encoding) if options.replay_hours else None
    for name, value in (replayed or {}).items():
        print(f"replay: {name:<18} {value:>12}")
    if options.json is not None:
        options.json.write_text(json.dumps({"fleet": rows, "replay": replayed}, indent=2) + "\n", "utf-8")
    lost = any(run.events_lost or run.events_twice or run.telemetry_lost for run in runs)
    return 1 if lost or (replayed and replayed["lost"]) else 0


def _until_recorded(path: Path, messages: int) -> None:
    """Returns when all is on disk, or after a while: what is missing then is lost."""
    until = time.monotonic() + _DRAIN_S
    while not _recorded_all(path, messages) and time.monotonic() < until:
        time.sleep(0.2)


def _recorded_all(path: Path, messages: int) -> bool:
    recorded, _events, _stored = _counted(path)
    return recorded >= messages


def _counted(path: Path) -> tuple[int, int, int]:
    """Telemetry and events in the store, the events alone, and the bytes that they take."""
    with FleetReader(path) as reader:
        telemetry, events, used_bytes = reader.sizes()
    return telemetry + events, events, used_bytes


@contextlib.contextmanager
def _scratch() -> Iterator[tuple[Broker, Path]]:
    with tempfile.TemporaryDirectory(prefix="edgellm-fleet-bench-") as folder:
        broker = Broker("mosquitto", Path(folder))
        with (Path(folder) / "broker.conf").open("a", encoding="utf-8") as config:
            # As the docs advise: by default it drops what comes while 1,000 messages wait for a receiver.
            config.write("max_queued_messages 0\n")
        broker.start()
        try:
            yield broker, Path(folder) / "fleet.db"
        finally:
            broker.stop()


def _ended(process: subprocess.Popen[str]) -> list[float]:
    process.terminate()
    output, _ = process.communicate(timeout=30)
    lags: list[float] = json.loads(output)
    return lags


def _url(broker: Broker) -> str:
    return f"mqtt://{broker.host}:{broker.port}"


def _pid(broker: Broker) -> int:
    process = broker._process  # noqa: SLF001 - only its time on the processor is read
    assert process is not None
    return process.pid


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--receivers", type=int, nargs="*", default=[1, 2], help="a run for each count")
    parser.add_argument("--encoding", choices=["json", "protobuf"], default="json")
    parser.add_argument("--replay-hours", type=float, default=24.0, help="0: no replay")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--receive", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--db", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
