"""The fleet's commands read the store, put trouble first, and say what is missing."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgellm.cli.fleet_table import age, sparkline
from edgellm.cli.main import app
from edgellm.fleet.store import Store, default_path
from edgellm.fleet.topics import DeviceTopics, envelope, state_event, telemetry_events
from edgellm.fleet.validate import Incoming
from edgellm.v1 import fleet_pb2
from tests.support.fleet_devices import ENGINE, NEXT_ENGINE, orin_nano_record


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*args: str):
    return CliRunner().invoke(app, ["fleet", *args])


def said(
    name: str, *, online: bool = True, governor: str = "NOMINAL", phase: str = "", now_ns: int | None = None
) -> list[Incoming]:
    """What one device told just now."""
    now_ns = now_ns or time.time_ns()
    topics = DeviceTopics("default", "line-1", name)
    state = fleet_pb2.DeviceState(online=online, session=1, active_engine=ENGINE, profile="orin-nano-8gb")
    told = [("state", state_event(topics, state, run=1, revision=1, time_ns=now_ns))]
    record = orin_nano_record(1, now_ns)
    record.governor.state = governor
    told += telemetry_events(topics, 1, record)
    if phase:
        report = envelope(topics, "reported", 1, 1, now_ns)
        report.reported.observed_generation, report.reported.phase = 3, phase
        report.reported.active_engine, report.reported.error = ENGINE, "disk full"
        wish = fleet_pb2.Event(id="d", source="edgellm/default/fleet", type="edgellm.desired.v1")
        wish.desired.generation, wish.desired.engine = 3, NEXT_ENGINE
        told += [("reported", report), ("desired", wish)]
    return [Incoming(topics, part, event, now_ns, retained=False) for part, event in told]


def record(*messages: list[Incoming]) -> None:
    with closing(Store(default_path())) as store:
        store.record([item for group in messages for item in group])


def test_trouble_comes_first():
    record(
        said("a-fine"), said("b-gone", online=False), said("c-critical", governor="CRITICAL"),
        said("d-hot", governor="HOT"), said("e-failed", phase="FAILED"),
        said("f-on-its-way", phase="FETCHING"),
    )  # fmt: skip
    shown = json.loads(run("status", "--json").stdout)["devices"]
    assert [item["device"] for item in shown] == [
        "c-critical", "d-hot", "b-gone", "e-failed", "f-on-its-way", "a-fine",
    ]  # fmt: skip
    lines = run("status").stdout.splitlines()
    assert lines[0].split()[:3] == ["DEVICE", "GROUP", "STATE"]
    assert lines[-1].startswith("6 devices, 5 online, 1 CRITICAL, 1 HOT, 2 not converged; recorded ")
    failed = next(line for line in lines if line.startswith("e-failed"))
    assert "aaaaaaaaaaaa → bbbbbbbbbbbb FAILED" in failed


def test_figures_of_a_device_that_is_away_are_not_shown_as_if_they_were_of_now():
    record(said("gone", online=False))
    assert "°C" not in run("status").stdout
    assert json.loads(run("status", "--json").stdout)["devices"][0]["telemetry"]["thermal"]


def test_one_device_is_shown_in_full():
    record(said("a", phase="FAILED"))
    text = run("status", "a").stdout
    for fact in (
        "orin-nano-8gb",
        "3.10 GB of 7.99 GB available",
        f"{NEXT_ENGINE}, generation 3",
        "disk full",
    ):
        assert fact in text


def test_a_name_from_the_network_commands_no_terminal():
    topics = DeviceTopics("default", "line-1", "a")
    event = envelope(topics, "worker", 1, 1, time.time_ns())
    event.worker.reason = "\x1b[2J\x1b]0;owned\x07"
    record(said("a"), [Incoming(topics, "worker", event, time.time_ns(), retained=False)])
    for command in (("status",), ("history", "a")):
        assert "owned" in run(*command).stdout
        assert "\x1b" not in run(*command).stdout


def test_history_shows_events_and_the_hours_of_telemetry():
    topics = DeviceTopics("default", "line-1", "a")
    now_ns = time.time_ns()
    event = envelope(topics, "governor", 1, 1, now_ns)
    event.governor.before, event.governor.now.state = "NOMINAL", "HOT"
    event.governor.now.reasons.append("temperature")
    record(said("a", now_ns=now_ns), [Incoming(topics, "governor", event, now_ns, retained=False)])
    assert "governor NOMINAL → HOT: temperature" in run("history", "a").stdout
    assert "62.1 / 62.1 / 62.1" in run("history", "a", "--kind", "telemetry").stdout
    lines = run("history", "a", "--kind", "telemetry", "--json", "--since", "1h").stdout.splitlines()
    assert [json.loads(line)["part"] for line in lines] == ["thermal", "power", "runtime"]


def test_forgetting_a_device_removes_it():
    record(said("a"), said("b"))
    assert run("forget", "a").stdout == "forgot edgellm/default/line-1/a\n"
    assert [item["device"] for item in json.loads(run("status", "--json").stdout)["devices"]] == ["b"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("status",), "nothing was recorded yet"),
        (("watch",), "no broker is known here"),
        (("set-engine", ENGINE, "--device", "a"), "no broker is known here"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_left_behind(home: Path, args: tuple[str, ...], message: str):
    done = run(*args)
    assert (done.exit_code, message in done.stderr) == (1, True)
    assert not home.exists()


def test_an_unknown_device_or_a_wrong_duration_is_said():
    record(said("a"))
    assert "no device 'b' was recorded; known: a" in run("status", "b").stderr
    done = run("history", "a", "--since", "yesterday")
    assert (done.exit_code, "write for example 90s" in done.stderr) == (2, True)


def test_set_engine_wants_devices_or_a_group():
    for args in ((), ("--device", "a", "--group", "b")):
        assert run("set-engine", ENGINE, *args).exit_code == 2


def test_without_paho_the_command_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "paho.mqtt.client", None)
    done = run("watch", "--broker", "mqtt://x.example")
    assert (done.exit_code, "pip install 'edgellm[fleet]'" in done.stderr) == (1, True)
    # What only reads needs none.
    record(said("a"))
    assert run("status").exit_code == 0


def test_a_sparkline_spans_its_values_and_leaves_gaps():
    assert sparkline([1, None, 3, 2]) == "▁ █▅"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([None]) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 d")]
)
def test_an_age_is_read_at_a_glance(seconds: int, words: str):
    assert age(seconds * 10**9) == words
