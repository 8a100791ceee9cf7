"""`edgellm top` shows many devices or one, on any terminal, whatever they say or do not say."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from edgellm.cli import readings, screens, watching
from edgellm.cli.live import sparkline
from edgellm.cli.main import app
from edgellm.cli.watching import Watch, Watched
from edgellm.devices import Device
from edgellm.v1 import telemetry_pb2
from tests.support.fake_device import FakeDevice, serve
from tests.support.orin_records import minute, record
from tests.support.terminal import Terminal

pytestmark = pytest.mark.usefixtures("home")


def watched(name: str = "jetson-01", message: telemetry_pb2.Telemetry | None = None) -> Watched:
    device = Watched(name, "192.0.2.1:7400")
    device.take(record() if message is None else message, 0.0)
    return device


def unreachable(name: str) -> Watched:
    device = Watched(name, "192.0.2.9:7400")
    device.fail("cannot reach the device at 192.0.2.9:7400: Connection refused", 3.0)
    return device


def drawn(devices: list[Watched], width: int = 200, height: int = 40, now_s: float = 0.0) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(screens.screen(devices, now_s, width, height))
    return console.file.getvalue()


def test_a_sparkline_is_blank_where_nothing_is_known_and_ends_at_its_bounds():
    points = [(0.0, -5.0), (10.0, 0.0), (11.0, 50.0), (30.0, 99.0), (39.9, 1000.0)]
    assert sparkline(points, 0.0, 40.0, 4, 0.0, 100.0) == "▁▅ █"
    assert sparkline([(-1.0, 1.0)], 0.0, 40.0, 4, 0.0, 100.0) == "    "


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(-1e9, 1e9))), st.integers(1, 80))
def test_a_sparkline_is_always_as_wide_as_it_should_be(points, cells):
    assert len(sparkline(points, 0.0, 60.0, cells, 0.0, 1.0)) == cells


def test_a_history_forgets_what_is_older_than_it_shows():
    history = watching.History()
    for second in range(5000):
        history.add(float(second), 1.0)
    assert [at_s for at_s, _ in history.since(4998.0)] == [4998.0, 4999.0]
    assert len(history.since(-math.inf)) == 600


def test_a_line_shows_what_the_device_says():
    text = drawn([watched(), watched("jetson-02", record(state="NOMINAL", celsius=50.0))])
    line = next(line for line in text.splitlines() if line.startswith("jetson-01"))
    assert " ".join(line.split()) == (
        "jetson-01 WARM 71.5 °C 27.5 °C ▅ 12.3 W 96 % 23 % 2.41 GB 9f86d081 serving 2/1 42.5 █ 3.46"
        " 310.0 MB of 1.20 GB"
    )
    assert "2 devices, 0 without an answer  ·  1 WARM  ·  85.0 tokens/s  ·  24.6 W" in text


def test_what_a_device_does_not_have_is_a_dash_and_never_a_zero():
    line = drawn([watched("laptop", telemetry_pb2.Telemetry(sequence=1)), watched()]).splitlines()[3]
    assert set(line.split()) == {"laptop", readings.ABSENT}
    values = {value for section in readings.sections(telemetry_pb2.Telemetry()) for _, value in section.facts}
    assert values == {readings.ABSENT}
    assert set(readings.row(telemetry_pb2.Telemetry())[1:]) == {readings.ABSENT}


def test_a_zero_that_is_known_is_shown():
    idle = record(tokens_per_s=0.0)
    idle.compute.gpu_percent = 0.0
    line = drawn([watched("idle", idle), watched()]).splitlines()[3]
    assert " 0 %" in line
    assert " 0.0 " in line


def test_an_engine_that_is_not_there_has_no_figures():
    message = record()
    message.runtime.CopyFrom(telemetry_pb2.Runtime(state="none"))
    assert readings.engine_facts(message) == (("state", "none"),)
    assert "0.0" not in drawn([watched("empty", message), watched()]).splitlines()[3]


@given(st.integers(1, 250), st.integers(1, 60))
def test_no_line_is_wider_than_the_terminal_and_each_begins_with_its_device(width, count):
    devices = [watched(f"jetson-{number:02}") for number in range(count)] + [unreachable("jetson-xx")]
    lines = screens.lines(devices, 0.0, width)
    assert len(lines) == count + 2
    if width >= len("jetson-00"):
        assert all(cell_len(line.plain.rstrip()) <= width for line in lines)
    assert all(line.plain.startswith("jetson-") for line in lines[1:-1])


def test_a_narrow_terminal_shows_what_matters_most():
    devices = [watched(), watched("jetson-02")]
    assert drawn(devices, width=80).splitlines()[2].split() == (
        ["DEVICE", "GOVERNOR", "TEMP", "MARGIN", "POWER", "GPU", "STATE", "TOK/S", "TOK/J"]
    )
    assert drawn(devices, width=40).splitlines()[2].split() == ["DEVICE", "GOVERNOR", "TEMP", "TOK/S"]


def test_when_not_all_have_room_those_in_trouble_come_first():
    devices = [watched(f"good-{number:02}", record(state="NOMINAL")) for number in range(50)]
    devices += [
        watched("warm", record(state="WARM")),
        unreachable("gone"),
        watched("hot", record(state="HOT")),
    ]
    names = [line.split()[0] for line in drawn(devices, height=15).splitlines()[3:13]]
    assert names == ["gone", "hot", "warm", *(f"good-{number:02}" for number in range(7))]
    assert "43 more: enlarge the window" in drawn(devices, height=15)
    assert "more:" not in drawn(devices, height=80)


def test_a_device_that_cannot_be_reached_is_a_line_that_says_so():
    lines = drawn([watched(), unreachable("jetson-02"), Watched("jetson-03", "192.0.2.3:7400")]).splitlines()
    assert lines[4].endswith("192.0.2.9:7400: Connection refused; next try in 3 s")
    assert lines[5].split() == ["jetson-03", "no", "answer", "yet"]


def test_states_have_colours():
    lines = screens.lines([watched(state, record(state=state)) for state in readings.STATES], 0.0)
    styles = [str(line.spans[0].style) for line in lines[1:]]
    assert styles == ["green", "yellow", "red", "bold white on red"]


def test_one_device_fills_the_screen_with_all_it_says():
    text = drawn([watched()], width=160)
    for fact in (
        "jetson-01  ·  192.0.2.1:7400",
        "71.5 °C; throttles at 99, off at 104.5",
        "VDD_CPU_GPU_CV  6.1 W",
        "over-current    average 2",
        "80 % of the time, 4 at once",
        "p50 210 ms, p95 400 ms, p99 1.30 s",
        "0 B of 3.99 GB",
        "1.15 GB resident, loaded in 1.2 s, 0 restarts",
        "0 events, 3 records, 1.2 kB",
    ):
        assert fact in text
    assert "Enlarge" not in text
    assert "Connection refused" in drawn([unreachable("jetson-02")], width=50)


@given(st.integers(20, 200), st.integers(4, 80))
def test_one_device_never_needs_more_than_the_terminal_has(width, height):
    lines = drawn([watched()], width, height).splitlines()
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)


def test_panels_without_room_are_left_out_and_it_says_so():
    text = drawn([watched()], 80, 24)
    assert "governor" in text
    assert "uplink" not in text
    assert "Enlarge the window" in text


def test_a_device_cannot_command_the_terminal():
    evil, message = "\x1b[2J\x1b]0;x\x07", record()
    for part, field in (
        (message.governor, "state"),
        (message.runtime, "state"),
        (message.runtime, "engine"),
        (message.power, "mode"),
        (message.thermal.zones[0], "name"),
        (message.power.rails[0], "name"),
        (message.power.over_current[0], "kind"),
    ):
        setattr(part, field, evil)
    message.governor.reasons.append(evil)
    gone = unreachable(evil)
    gone.failure = evil
    text = drawn([watched(evil, message)]) + drawn([watched(evil, message), gone])
    text += "".join(readings.lines(evil, message)) + "".join(readings.row(message))
    assert not {"\x1b", "\x07"} & set(text)


def test_the_page_shows_what_is_drawn():
    page = (Path(__file__).parents[3] / "docs/observing.md").read_text("utf-8")
    devices = []
    for number, (celsius, state) in enumerate(((62.0, "NOMINAL"), (88.0, "WARM"), (96.6, "HOT")), start=1):
        devices.append(Watched(f"jetson-0{number}", f"192.0.2.{number}:7400"))
        for second, message in enumerate(minute(celsius, state)):
            devices[-1].take(message, float(second))
    gone = Watched("jetson-04", "192.0.2.4:7400")
    gone.fail("cannot reach the device at 192.0.2.4:7400: Connection refused", 63.0)
    pictures = [
        drawn([*devices, gone], width=120, now_s=60.0),
        drawn(devices[2:], width=120, now_s=60.0),
        "\n".join(readings.lines("jetson-02", devices[1].record)),
    ]
    for picture in pictures:
        assert "\n".join(line.rstrip() for line in picture.strip().splitlines()) in page


async def until(probe, what: str) -> None:
    deadline_s = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.01)


@contextmanager
def serving(device: FakeDevice, address: str):
    server, _ = serve(device, address)
    try:
        yield
    finally:
        device.cancelled.set()
        server.stop(grace=None).wait()


def playing(*records: telemetry_pb2.Telemetry) -> FakeDevice:
    device = FakeDevice()
    device.records = list(records or [record()])
    return device


async def test_a_device_that_goes_away_and_comes_back_is_shown_again(tmp_path):
    address = f"unix://{tmp_path}/a.sock"
    devices = [Device("jetson-01", address)]
    async with Watch(devices, 0.1, sleep=lambda _: asyncio.sleep(0.02)) as watch:
        (device,) = watch.devices
        await watch.settled.wait()
        assert "cannot reach" in device.failure
        for celsius in (50.0, 60.0):
            with serving(playing(record(celsius=celsius)), address):
                await until(lambda: device.record is not None, "it did not come back")
                assert (device.record.thermal.max_celsius, device.failure) == (celsius, "")
            await until(lambda: device.failure, "it was not missed")
            assert device.record is None


async def test_a_device_that_says_nothing_holds_up_no_other(tmp_path):
    silent = playing()
    silent.mute.set()
    addresses = [f"unix://{tmp_path}/{name}.sock" for name in "ab"]
    with serving(silent, addresses[0]), serving(playing(), addresses[1]):
        devices = [Device(name, address) for name, address in zip("ab", addresses, strict=True)]
        async with Watch(devices, 0.1, answer_s=0.3) as watch:
            mute, good = watch.devices
            await until(lambda: good.record is not None, "the good one is not shown")
            assert not mute.settled
            await watch.settled.wait()
        assert "sends no telemetry" in mute.failure
        assert good.record is not None


async def test_a_plug_that_is_pulled_is_noticed_though_the_connection_lives_on(tmp_path):
    playing_ = playing()
    with serving(playing_, f"unix://{tmp_path}/a.sock"):
        async with Watch([Device("a", f"unix://{tmp_path}/a.sock")], 0.1, answer_s=0.3) as watch:
            await watch.settled.wait()
            assert watch.devices[0].record is not None
            playing_.mute.set()
            await until(lambda: watch.devices[0].failure, "it was not noticed")


async def test_tries_come_less_and_less_often(tmp_path):
    pauses, enough = [], asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 6:
            enough.set()
            await asyncio.Event().wait()

    async with Watch([Device("a", f"unix://{tmp_path}/a.sock")], 1.0, sleep=sleep):
        await asyncio.wait_for(enough.wait(), 20)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


@pytest.fixture
def fleet(home, tmp_path):
    """One device that answers, and one that is not there."""
    good = f"unix://{tmp_path}/good.sock"
    for name, target in (("jetson-01", good), ("jetson-02", f"unix://{tmp_path}/gone.sock")):
        assert CliRunner().invoke(app, ["device", "add", name, target]).exit_code == 0
    with serving(playing(), good):
        yield


def top(*args: str):
    return CliRunner().invoke(app, ["top", *args])


@pytest.mark.usefixtures("fleet")
def test_in_a_pipe_it_prints_one_whole_table_and_ends():
    result = top()
    headers, good, gone = result.stdout.splitlines()
    assert headers.split()[0] == "DEVICE"
    assert good.split()[:4] == ["jetson-01", "WARM", "71.5", "°C"]
    assert good.endswith("310.0 MB of 1.20 GB")
    assert gone.startswith("jetson-02  cannot reach")
    assert (result.exit_code, top("--once").stdout) == (0, result.stdout)


@pytest.mark.usefixtures("fleet")
def test_json_is_one_line_per_device_with_the_names_of_the_contract():
    good, gone = map(json.loads, top("--json").stdout.splitlines())
    assert good["telemetry"]["runtime"]["tokens_per_joule"] == 3.46
    assert good["telemetry"]["memory"]["swap_used_bytes"] == "0"
    assert (gone["device"], "cannot reach" in gone["error"]) == ("jetson-02", True)


@pytest.mark.usefixtures("fleet")
def test_it_fails_when_no_device_answers():
    assert top("--device", "jetson-02").exit_code == 1
    assert top("--device", "jetson-01", "--device", "jetson-01").stdout.count("jetson-01") == 1


def test_without_a_known_device_it_says_how_to_add_one():
    result = top()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "edgellm device add" in result.stderr


@pytest.fixture
def terminal(fleet):
    opened = []

    def start(*args: str, **options) -> Terminal:
        opened.append(Terminal(*args, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.parametrize("key", [b"\x03", b"q"], ids=["Ctrl-C", "q"])
def test_on_a_terminal_it_goes_on_until_a_key_and_leaves_the_terminal_as_it_was(terminal, key):
    shown = terminal("top", "--interval", "0.1")
    shown.wait_for("jetson-02")
    shown.wait_for("71.5 °C")
    assert shown.modes_now() != shown.modes
    shown.press(key)
    assert shown.ended() == 0
    assert "\x1b[?1049h" in shown.seen
    assert shown.seen.rstrip().endswith("\x1b[?25h\x1b[?1049l") or shown.seen.rstrip().endswith(
        "\x1b[?1049l\x1b[?25h"
    )
    assert shown.modes_now() == shown.modes
    assert "Traceback" not in shown.seen
    assert "Aborted" not in shown.seen


def test_a_device_that_goes_away_on_a_terminal_is_told_in_its_line_and_nowhere_else(terminal, tmp_path):
    address = f"unix://{tmp_path}/third.sock"
    with serving(playing(), address):
        shown = terminal("top", "--interval", "0.1", "--device", address)
        shown.wait_for("throttles at 99")
    shown.wait_for("next try in")
    shown.press(b"q")
    assert shown.ended() == 0
    assert "transport" not in shown.seen


def test_a_new_size_of_the_terminal_is_used_at_once(terminal):
    shown = terminal("top", "--interval", "60", size=(24, 80))
    shown.wait_for("71.5 °C")
    assert "KV CACHE" not in shown.seen
    shown.resize(40, 200)
    shown.wait_for("KV CACHE")
    shown.press(b"q")
    assert shown.ended() == 0


def test_telemetry_on_a_terminal_is_renewed_in_its_place(terminal):
    shown = terminal("device", "telemetry", "jetson-01", "--watch", "--interval", "0.1", size=(60, 100))
    shown.wait_for("throttles at 99")
    shown.wait_for("\x1b[1A")
    shown.press(b"\x03")
    assert shown.ended() == 0
    assert shown.seen.rstrip().endswith("\x1b[?25h")
