"""`edgellm fleet set-engine` and its fellows on a real mosquitto with devices that answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgellm.bundle import Bundle, BundleWriter
from edgellm.cli.main import app
from edgellm.fleet.desired import Controller, plan
from edgellm.fleet.settings import BrokerSettings
from edgellm.v1 import fleet_pb2
from tests.support.broker import Broker, find_mosquitto, listening, running_broker
from tests.support.fleet_devices import ENGINE, NEXT_ENGINE, SimulatedDevice
from tests.support.tiny_bundle import make_config, make_files

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

SOURCE = "https://files.example/engines"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running_broker("mosquitto") as running:
        yield running


def fleet(broker: Broker, *args: object):
    command = ["fleet", *map(str, args), "--broker", f"mqtt://{broker.host}:{broker.port}"]
    return CliRunner().invoke(app, command)


def set_engine(broker: Broker, *args: object, engine: object = NEXT_ENGINE):
    return fleet(broker, "set-engine", engine, "--source", SOURCE, *args)


def refused(desired: fleet_pb2.Desired) -> list[fleet_pb2.Reported]:
    return [
        fleet_pb2.Reported(
            observed_generation=desired.generation,
            desired_engine=desired.engine,
            phase="REFUSED",
            error="the source is not on the allow-list",
        )
    ]


def test_devices_are_followed_until_they_run_the_engine(broker: Broker):
    with SimulatedDevice(broker, "a") as a, SimulatedDevice(broker, "b") as b:
        done = set_engine(broker, "--device", "a,line-1/b", "--wait", "--timeout", 20, "--json")
        assert done.exit_code == 0, done.stderr
        assert (a.active, b.active) == (NEXT_ENGINE, NEXT_ENGINE)
    said = json.loads(done.stdout)
    assert said["ok"]
    assert [(item["device"], item["generation"], item["phase"]) for item in said["devices"]] == [
        ("a", 1, "CONVERGED"),
        ("b", 1, "CONVERGED"),
    ]


def test_one_device_that_refuses_makes_the_command_fail_with_its_reason(broker: Broker):
    with SimulatedDevice(broker, "a"), SimulatedDevice(broker, "b") as b:
        b.answer = refused
        done = set_engine(broker, "--group", "line-1", "--wait", "--timeout", 20)
    assert done.exit_code == 1
    assert "CONVERGED" in done.stdout
    assert "REFUSED: the source is not on the allow-list" in done.stdout


def test_a_device_that_is_away_finds_its_engine_when_it_returns(broker: Broker):
    away = SimulatedDevice(broker, "a")
    away.connect()
    away.vanish()
    done = set_engine(broker, "--device", "a", "--wait", "--timeout", 0.5)
    assert done.exit_code == 1
    assert "OFFLINE" in done.stdout
    with (
        listening(broker, "edgellm/v1/default/line-1/a/reported") as reports,
        SimulatedDevice(broker, "a", session=away.session),
    ):
        said = reports.wait_for(lambda message: message.event.reported.phase == "CONVERGED")
    assert said.event.reported.active_engine == NEXT_ENGINE


def test_each_device_s_generation_is_above_all_that_it_has_seen(broker: Broker):
    with SimulatedDevice(broker, "a") as a, SimulatedDevice(broker, "b"):
        a.send(a.reported(fleet_pb2.Reported(observed_generation=41, phase="CONVERGED")))[0].wait_for_publish(
            10
        )
        set_engine(broker, "--device", "a")
        done = set_engine(broker, "--group", "line-1", "--json", engine=ENGINE)
    devices = json.loads(done.stdout)["devices"]
    assert [(item["device"], item["generation"]) for item in devices] == [("a", 43), ("b", 1)]


def test_of_two_operators_at_once_the_one_whom_the_device_does_not_follow_is_told(broker: Broker):
    settings = BrokerSettings(broker=f"mqtt://{broker.host}:{broker.port}")
    both_are_set = threading.Event()

    def obey_at_last(desired: fleet_pb2.Desired) -> Sequence[fleet_pb2.Reported]:
        assert both_are_set.wait(20)
        return a.obey(desired)

    with SimulatedDevice(broker, "a") as a, Controller(settings) as one, Controller(settings) as other:
        a.answer = obey_at_last
        first = plan(one.twins(), lambda _: ENGINE, SOURCE)
        second = plan(other.twins(), lambda _: NEXT_ENGINE, SOURCE)
        assert first[0].desired.generation == second[0].desired.generation
        one.publish(first)
        other.publish(second)
        assert [twin.desired.engine for twin in one.twins()] == [NEXT_ENGINE]
        # The broker keeps the second wish, and nobody knows yet which one the device took.
        assert [item.phase for item in next(one.follow(first, 0))] == ["WAITING"]
        both_are_set.set()
        ((winner,), (loser,)) = ([*one.follow(first, 20)][-1], [*other.follow(second, 20)][-1])
    assert (winner.phase, loser.phase) == ("CONVERGED", "REPLACED")
    assert ENGINE in loser.detail


def test_an_engine_is_read_from_a_bundle(broker: Broker, tmp_path: Path):
    with BundleWriter(tmp_path / "tiny.bundle") as writer:
        writer.add(make_files(tmp_path / "files"), make_config())
    bundle = Bundle.open(tmp_path / "tiny.bundle")
    with SimulatedDevice(broker, "a"):
        done = set_engine(broker, "--device", "a", "--json", engine=bundle.path)
    assert json.loads(done.stdout)["devices"][0]["engine"] == bundle.variants[0].digest


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["set-engine", "sha256:abc", "--device", "a"], "not the digest of an engine: 'sha256:abc'"),
        (["set-engine", "smollm2", "--device", "a"], "not the digest of an engine: 'smollm2'"),
        (["set-engine", ENGINE, "--device", "b"], "the broker knows no device 'b'; it knows: a"),
        (["set-engine", ENGINE, "--group", "x"], "no device of group 'x' is known; groups: line-1"),
        (["set-engine", ENGINE, "--device", "a", "--source", "ftp://x/y"], "--source 'ftp://x/y'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_set(broker: Broker, args: list[str], message: str):
    with SimulatedDevice(broker, "a") as device, listening(broker, device.topics.desired) as wishes:
        done = fleet(broker, *args)
        assert done.exit_code == 1
        assert message in done.stderr
        device.send(device.events(1))[0].wait_for_publish(10)
        assert wishes.drain() == []


def test_a_broker_that_was_kept_need_not_be_named_again(broker: Broker, home: Path):
    url = f"mqtt://{broker.host}:{broker.port}"
    with SimulatedDevice(broker, "a"):
        done = CliRunner().invoke(app, ["fleet", "connect", url])
        assert "knows 1 devices" in done.stdout, done.stderr
        done = CliRunner().invoke(app, ["fleet", "set-engine", ENGINE, "--device", "a"])
        assert done.exit_code == 0, done.stderr
    assert (home / "fleet.toml").read_text() == f'broker = "{url}"\ntenant = "default"\n'


def test_a_broker_that_is_not_there_is_said_and_not_kept(broker: Broker, home: Path):
    broker.stop()
    done = CliRunner().invoke(app, ["fleet", "connect", f"mqtt://{broker.host}:{broker.port}"])
    assert done.exit_code == 1
    assert "cannot be reached" in done.stderr
    assert "refused" in done.stderr
    assert not home.exists()


def test_status_shows_what_a_watch_has_recorded(broker: Broker):
    with SimulatedDevice(broker, "a"), SimulatedDevice(broker, "b"):
        assert "2 devices, 2 online" in fleet(broker, "watch", "--once").stdout
    shown = json.loads(CliRunner().invoke(app, ["fleet", "status", "--json"]).stdout)
    assert {item["device"]: item["online"] for item in shown["devices"]} == {"a": True, "b": True}
