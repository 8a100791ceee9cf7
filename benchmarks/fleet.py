"""What a fleet costs its broker and receivers: many devices on one mosquitto.

python -m benchmarks.fleet                      devices with the agent's own publisher and its defaults
python -m benchmarks.fleet --restart            and a broker that is away for ten seconds in the middle
python -m benchmarks.fleet --publisher flood    simulated devices that send everything of every record
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from typing_extensions import Self

from benchmarks.fleet_devices import DeviceProcesses, Told
from benchmarks.fleet_swarm import Swarm
from edgellm.fleet.queries import FleetReader
from edgellm.fleet.receiver import Receiver
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.topics import Encoding
from edgellm.fleet.validate import Incoming
from scripts.demo_broker import Broker, find_mosquitto

_READY_S = 30.0
_DRAIN_S = 60.0
_REPLAY_RECORDS = 300
# How long a broker that is restarted is away.
_AWAY_S = 10.0
# When a broker with persistence writes its whole file: each second, or with each change.
_AUTOSAVE = {
    "none": "persistence false\n",
    "second": "persistence true\nautosave_on_changes false\nautosave_interval 1\n",
    "change": "persistence true\nautosave_on_changes true\nautosave_interval 1\n",
}


@dataclass(frozen=True)
class Figures:
    """What one run measured."""

    publisher: str
    persistence: str
    devices: int
    receivers: int
    seconds: float
    published: int
    published_per_s: float
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
    telemetry_sent: int
    telemetry_lost: int
    # Seconds from the broker's return until half of the devices, and all, were connected again.
    back_p50_s: float | None
    back_all_s: float | None
    load_before: float


class RealDevices:
    """The agent's publisher, for each device, in processes of their own."""

    def __init__(self, broker: Broker, count: int, processes: int, folder: Path, restart: bool) -> None:
        self._broker, self._count, self._restart = broker, count, restart
        # Their disks are not what is measured: each device has its own.
        self._processes = DeviceProcesses(broker.host, broker.port, folder, count, processes)
        # When the broker was there again.
        self.back_s = 0.0

    @property
    def pids(self) -> list[int]:
        """The devices' processes."""
        return self._processes.pids

    def __enter__(self) -> Self:
        self._processes.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._processes.__exit__(*exception)

    def run(self, seconds: int) -> None:
        """Lets them work for so long."""
        self._processes.go()
        if not self._restart:
            time.sleep(seconds)
            return
        time.sleep(seconds / 3)
        self._broker.stop()
        time.sleep(_AWAY_S)
        self._broker.start()
        self.back_s = time.monotonic()
        time.sleep(max(0.0, seconds * 2 / 3 - _AWAY_S))

    def finish(self) -> Told:
        """What they told; the broker has it."""
        return self._processes.finish()

    def close(self) -> None:
        """They say goodbye."""
        self._processes.close()


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


def fleet(options: argparse.Namespace, receiver_count: int) -> Figures:
    """So many devices at one record a second."""
    count, seconds = options.devices, options.seconds
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        broker, path = stack.enter_context(_scratch(options.persistence))
        recorders = stack.enter_context(receivers(broker, path, receiver_count))
        devices = _devices(stack, broker, options)
        pids = [*devices.pids, *(process.pid for process in recorders)]
        before, began = [_cpu_s(pid) for pid in pids], time.monotonic()
        broker_cpu = _BrokerCpu(broker)
        devices.run(seconds)
        elapsed_s = time.monotonic() - began
        cpu = [100 * (_cpu_s(pid) - old) / elapsed_s for pid, old in zip(pids, before, strict=True)]
        mosquitto = broker_cpu.percent(elapsed_s)
        told = devices.finish()
        _until_recorded(path, told.events + told.telemetry)
        recorded, events, stored = _counted(path)
        devices.close()
        lags = sorted(lag for process in recorders for lag in _ended(process))
    back = sorted(told.connected_s)
    if options.restart and len(back) < count:
        raise RuntimeError(f"only {len(back)} of {count} devices came back")
    senders = len(devices.pids)
    return Figures(
        publisher=options.publisher,
        persistence=options.persistence,
        devices=count,
        receivers=receiver_count,
        seconds=round(elapsed_s, 1),
        published=told.messages,
        published_per_s=round(told.messages / elapsed_s),
        lag_p50_ms=round(lags[len(lags) // 2], 1),
        lag_p99_ms=round(lags[len(lags) * 99 // 100], 1),
        mb_per_device_hour=round(told.bytes / count / elapsed_s * 3600 / 1e6, 2),
        stored_bytes_per_message=round(stored / recorded),
        mosquitto_cpu_percent=round(mosquitto, 1),
        receiver_cpu_percent=round(sum(cpu[senders:]), 1),
        devices_cpu_percent=round(sum(cpu[:senders]), 1),
        events_sent=told.events,
        events_lost=max(0, told.events - events),
        events_twice=max(0, events - told.events),
        telemetry_sent=told.telemetry,
        telemetry_lost=told.telemetry - (recorded - events),
        back_p50_s=round(back[len(back) // 2] - devices.back_s, 1) if back else None,
        back_all_s=round(back[-1] - devices.back_s, 1) if back else None,
        load_before=round(load, 1),
    )


def _devices(stack: contextlib.ExitStack, broker: Broker, options: argparse.Namespace) -> Swarm | RealDevices:
    if options.publisher == "flood":
        return Swarm(broker, options.devices, options.encoding)
    memory = Path("/dev/shm")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)))
    return stack.enter_context(
        RealDevices(broker, options.devices, options.processes, folder, options.restart)
    )


class _BrokerCpu:
    """The processor time of a broker, which may become another process."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._pid, self._before_s = _pid(broker), _cpu_s(_pid(broker))

    def percent(self, elapsed_s: float) -> float:
        """Of one core; after a restart, of the second process alone, over the whole time."""
        pid = _pid(self._broker)
        return 100 * (_cpu_s(pid) - (self._before_s if pid == self._pid else 0.0)) / elapsed_s


def replay(hours: float, encoding: Encoding) -> dict[str, float]:
    """The telemetry of one device that was away for so long, as fast as it is taken."""
    records = round(hours * 3600)
    with _scratch("none") as (broker, path), receivers(broker, path, 1) as processes:
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
    runs = [fleet(options, count) for count in options.receivers]
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
def _scratch(persistence: str) -> Iterator[tuple[Broker, Path]]:
    with tempfile.TemporaryDirectory(prefix="edgellm-fleet-bench-") as folder:
        kept = f"{_AUTOSAVE[persistence]}persistence_location {folder}/\n"
        # As the docs advise: by default it drops what comes while 1,000 messages wait for a receiver.
        options = f"allow_anonymous true\nmax_queued_messages 0\n{kept}"
        broker = Broker("mosquitto", Path(folder), options=options)
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--receivers", type=int, nargs="*", default=[1, 2], help="a run for each count")
    parser.add_argument("--publisher", choices=["real", "flood"], default="real")
    parser.add_argument("--processes", type=int, default=4, help="of the real devices")
    parser.add_argument("--restart", action="store_true", help="of the broker, in the middle; real devices")
    parser.add_argument("--persistence", choices=sorted(_AUTOSAVE), default="none", help="when it writes")
    parser.add_argument("--encoding", choices=["json", "protobuf"], default="json", help="of the flood")
    parser.add_argument("--replay-hours", type=float, default=0.0, help="a device that was away so long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--receive", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--db", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
