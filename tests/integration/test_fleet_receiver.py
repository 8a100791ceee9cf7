"""The receiver on a real mosquitto: nothing is lost and nothing counted twice, whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm.fleet.queries import DeviceView, FleetReader
from edgellm.fleet.receiver import Receiver
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.topics import DeviceTopics
from edgellm.v1 import fleet_pb2
from tests.support.broker import Broker, find_mosquitto, running_broker
from tests.support.fleet_devices import PersistentBroker, SimulatedDevice, kill

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

_WAIT_S = 30.0


# As the documentation asks for: by default mosquitto keeps 1,000 messages for a receiver that is away, and
# drops those behind them. On a busy machine that many come together here.
_NO_BOUND = "allow_anonymous true\npersistence false\nmax_queued_messages 0"


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running_broker("mosquitto", _NO_BOUND) as running:
        yield running


@pytest.fixture
def persistent(tmp_path: Path) -> Iterator[PersistentBroker]:
    folder = tmp_path / "broker"
    folder.mkdir()
    running = PersistentBroker(folder)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.db"


@contextlib.contextmanager
def receiving(broker: Broker, path: Path) -> Iterator[Receiver]:
    receiver = Receiver(BrokerSettings(broker=f"mqtt://{broker.host}:{broker.port}"), path)
    receiver.start()
    try:
        receiver.wait_ready(15)
        yield receiver
    finally:
        receiver.close()


@contextlib.contextmanager
def watching(broker: Broker, path: Path) -> Iterator[subprocess.Popen[str]]:
    """`edgellm fleet watch --json` in a process of its own, that can be killed."""
    code = "from edgellm.cli.main import main; main()"
    url = f"mqtt://{broker.host}:{broker.port}"
    command = [sys.executable, "-c", code, "fleet", "watch", "--json", "--broker", url, "--db", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            yield process
        finally:
            process.kill()


def until(path: Path, holds: Callable[[FleetReader], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        if path.exists():
            with FleetReader(path) as reader:
                if holds(reader):
                    return
        time.sleep(0.05)
    with FleetReader(path) as reader:
        raise AssertionError(f"not within {_WAIT_S} s; {reader.counters()}, {reader.rejects(3)}")


def event_ids(reader: FleetReader, topics: DeviceTopics) -> list[str]:
    return sorted(event.id for _, event in reader.events(topics, 0, 100_000))


def crashes(count: int) -> list[str]:
    return sorted(f"1-worker-{number + 1}" for number in range(count))


def until_crashes(path: Path, topics: DeviceTopics, count: int) -> None:
    until(path, lambda reader: event_ids(reader, topics) == crashes(count))


def counter(path: Path, name: str) -> int:
    with FleetReader(path) as reader:
        return reader.counters().get(name, 0)


def view(reader: FleetReader, name: str) -> DeviceView | None:
    return next((item for item in reader.devices() if item.topics.device == name), None)


def online(path: Path, name: str, expected: bool) -> None:
    def holds(reader: FleetReader) -> bool:
        device = view(reader, name)
        return device is not None and device.online == expected

    until(path, holds)


def test_shuffled_and_repeated_messages_are_each_recorded_once(broker: Broker, path: Path) -> None:
    with receiving(broker, path), SimulatedDevice(broker) as device:
        messages = [*device.telemetry(30), *device.events(20)]
        mixed = messages * 2
        random.Random(4).shuffle(mixed)
        device.send(mixed)
        until(path, lambda reader: reader.counters().get("duplicates", 0) >= len(messages))
        with FleetReader(path) as reader:
            taken = [(number, name) for _, _, number, name, _ in reader.telemetry(device.topics, 0)]
            assert event_ids(reader, device.topics) == crashes(20)
            newest = view(reader, "jetson-01")
    assert taken == [(n, name) for n in range(1, 31) for name in ("thermal", "power", "runtime")]
    assert newest is not None
    assert newest.telemetry.sequence == 30


def test_a_will_takes_the_device_offline_and_a_late_one_does_not(broker: Broker, path: Path) -> None:
    with receiving(broker, path):
        first = SimulatedDevice(broker)
        first.connect()
        online(path, "jetson-01", True)
        first.vanish()
        online(path, "jetson-01", False)
        with SimulatedDevice(broker, session=first.session) as again:
            online(path, "jetson-01", True)
            # The will of the session before arrives once more, after the birth; then something to wait for.
            again.send([again.will(first.session), *again.events(1)])
            until_crashes(path, again.topics, 1)
            online(path, "jetson-01", True)


def test_a_receiver_that_comes_later_finds_what_the_broker_has_kept(broker: Broker, path: Path) -> None:
    with SimulatedDevice(broker) as device:
        device.send(device.reported(fleet_pb2.Reported(phase="CONVERGED", active_name="smollm2")))
        with receiving(broker, path):
            until(path, lambda reader: bool((it := view(reader, "jetson-01")) and it.reported and it.online))


def test_bad_messages_are_kept_with_their_reason_and_stop_nothing(broker: Broker, path: Path) -> None:
    with receiving(broker, path), SimulatedDevice(broker) as device:
        for topic in (device.topics.event("worker"), device.topics.telemetry("thermal"), device.topics.state):
            for payload in (b"{", b"\xff\xfe", b"x" * 100_000, b'{"id": "1"}'):
                device.client.publish(topic, payload, qos=1)
        device.send(device.events(2))
        until_crashes(path, device.topics, 2)
        with FleetReader(path) as reader:
            counters, rejects = reader.counters(), reader.rejects(100)
    assert (counters["rejected"], counters["rejected: too large"], len(rejects)) == (12, 3, 12)


def test_a_receiver_killed_mid_stream_loses_no_event_and_counts_none_twice(
    broker: Broker, path: Path
) -> None:
    chance = random.Random(7)
    total = 0
    with SimulatedDevice(broker) as device:
        for life in range(3):
            with watching(broker, path) as watch:
                assert watch.stdout is not None
                if life == 0:
                    # The birth: from here on the broker knows the receiver, and keeps what it does not take.
                    assert json.loads(watch.stdout.readline())["event"]["state"]["online"]
                for _ in range(100):
                    device.send(device.events(4))
                total += 400
                least = total - chance.randrange(100, 390)
                until(path, lambda reader, least=least: len(event_ids(reader, device.topics)) >= least)
                watch.kill()
            # Said while nobody receives: the broker keeps it for the session that comes back.
            device.send(device.events(50))
            total += 50
        with receiving(broker, path):
            until_crashes(path, device.topics, total)


def test_two_receivers_share_telemetry_and_one_that_dies_takes_no_event_with_it(
    broker: Broker, path: Path
) -> None:
    with SimulatedDevice(broker) as device, receiving(broker, path) as first:
        with watching(broker, path) as second:
            # Both take each event, and the one that is second counts a duplicate: both are at work.
            rounds = 0
            while counter(path, "duplicates") < 2:
                rounds += 1
                device.send(device.events(1))
                until_crashes(path, device.topics, rounds)
            before = counter(path, "duplicates")
            device.send(device.telemetry(200))
            until(path, lambda reader: len(list(reader.telemetry(device.topics, 0))) == 600)
            # Had each received all of it, as many would have come twice.
            assert counter(path, "duplicates") - before < 100
            second.kill()
        device.send(device.events(100))
        until_crashes(path, device.topics, rounds + 100)
        assert first.connected


def test_a_broker_killed_without_a_memory_costs_no_event_of_a_device_that_sends_again(
    broker: Broker, path: Path
) -> None:
    with receiving(broker, path) as receiver, SimulatedDevice(broker) as device:
        device.send(device.events(50))
        until_crashes(path, device.topics, 50)
        kill(broker)
        device.send(device.events(50))
        broker.start()
        until_crashes(path, device.topics, 100)
        online(path, "jetson-01", True)
        until(path, lambda _: receiver.connected)


def test_a_broker_with_a_memory_keeps_events_for_a_receiver_that_is_away_even_when_killed(
    persistent: PersistentBroker, path: Path
) -> None:
    with receiving(persistent, path):
        pass  # the broker knows it now
    with SimulatedDevice(persistent) as device:
        for sent in device.send(device.events(200)):
            sent.wait_for_publish(_WAIT_S)
        # mosquitto acknowledges before it saves: only when it has answered to more is all before on its disk.
        for _ in range(2):
            device.send(device.state())[0].wait_for_publish(_WAIT_S)
        kill(persistent)
        persistent.start()
        with receiving(persistent, path):
            until_crashes(path, device.topics, 200)


def test_an_unwritable_store_acknowledges_nothing_until_it_can_be_written(broker: Broker, path: Path) -> None:
    with receiving(broker, path) as receiver, SimulatedDevice(broker) as device:
        device.send(device.events(1))
        until_crashes(path, device.topics, 1)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as spoiler:
            spoiler.execute(
                "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
            device.send(device.events(20))
            until(path, lambda _: "full" in receiver.trouble)
            spoiler.execute("DROP TRIGGER full")
        until_crashes(path, device.topics, 21)
        until(path, lambda _: receiver.trouble == "")


def test_a_watch_that_only_looks_leaves_nothing_behind(broker: Broker, tmp_path: Path) -> None:
    code = "from edgellm.cli.main import main; main()"
    command = [sys.executable, "-c", code, "fleet", "watch", "--once", "--no-record", "--broker"]
    environment = {**os.environ, "EDGELLM_HOME": str(tmp_path / "home")}
    with SimulatedDevice(broker):
        done = subprocess.run(
            [*command, f"mqtt://{broker.host}:{broker.port}"],
            capture_output=True, text=True, timeout=60, env=environment, check=True,
        )  # fmt: skip
    assert "jetson-01  line-1  online" in done.stdout
    assert not (tmp_path / "home").exists()


def test_on_a_terminal_the_fleet_is_a_live_table_until_it_is_interrupted(broker: Broker, path: Path) -> None:
    ours, theirs = pty.openpty()
    code = "from edgellm.cli.main import main; main()"
    url = f"mqtt://{broker.host}:{broker.port}"
    command = [sys.executable, "-c", code, "fleet", "watch", "--broker", url, "--db", str(path)]
    environment = {**os.environ, "COLUMNS": "200", "LINES": "30", "TERM": "xterm"}
    shown = b""
    with (
        SimulatedDevice(broker),
        subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process,
    ):
        os.close(theirs)
        deadline = time.monotonic() + _WAIT_S
        while b"1 devices, 1 online" not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # its end of the terminal is closed
            while select.select([ours], [], [], _WAIT_S)[0] and (piece := os.read(ours, 65536)):
                shown += piece
        assert process.wait(_WAIT_S) == 0, shown
    os.close(ours)
    assert b"jetson-01" in shown
    assert b"line-1" in shown
