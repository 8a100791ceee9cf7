"""Recordings played back through the real readers, and the scenarios that ship with the agent."""

import gzip
import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from edgellm.errors import EdgellmError
from edgellm.v1 import telemetry_pb2
from edgellm_agent.config import AgentSettings
from edgellm_agent.main import app
from edgellm_agent.telemetry.base import Clock, Source
from edgellm_agent.telemetry.detect import SourceChoice, open_source, parse_source, source_setting
from edgellm_agent.telemetry.recording import Header, Recording, Snapshot, Unreadable
from edgellm_agent.telemetry.replay import ReplaySource, load_recording, scenario_names
from tests.support import boards

ZONE = "sys/class/thermal/thermal_zone0"
SCENARIOS = Path(__file__).parents[3] / "scripts/scenarios.py"


class Time:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def clock(self) -> Clock:
        return Clock(monotonic_ns=lambda: round(self.now_s * 1e9))


def read(source: Source) -> telemetry_pb2.Telemetry:
    record = telemetry_pb2.Telemetry()
    for probe in source.probes:
        if (part := probe.read()) is not None:
            getattr(record, probe.part).CopyFrom(part)
    return record


def recorded(*temperatures: str | Unreadable | None) -> Recording:
    """A board with one zone, whose temperature changes once a second."""
    first = {f"{ZONE}/type": "tj-thermal\n", f"{ZONE}/temp": temperatures[0]}
    files = [first, *({f"{ZONE}/temp": value} for value in temperatures[1:])]
    snapshots = tuple(Snapshot(t_s=float(second), files=each) for second, each in enumerate(files))
    return Recording(Header(board="", kernel="", l4t="", started=""), snapshots)


Play = Callable[..., ReplaySource]


@pytest.fixture
def play() -> Iterator[Play]:
    """Play a recording; its folder is removed in the end."""
    sources: list[ReplaySource] = []

    def start(what: Recording, **options: object) -> ReplaySource:
        sources.append(ReplaySource(what, **options))
        return sources[-1]

    yield start
    for source in sources:
        source.close()


def temperature(source: Source) -> float | None:
    thermal = read(source).thermal
    return thermal.max_celsius if thermal.zones else None


def test_a_replay_follows_the_clock_and_stays_with_its_last_snapshot(play: Play) -> None:
    time = Time()
    source = play(recorded("40000\n", "50000\n", "60000\n"), clock=time.clock())
    # It begins with the first read, however long that takes.
    time.now_s += 100
    seen = []
    for _ in range(8):
        seen.append(temperature(source))
        time.now_s += 0.5
    assert seen == [40.0, 40.0, 50.0, 50.0, 60.0, 60.0, 60.0, 60.0]
    time.now_s += 86_400
    assert temperature(source) == 60.0


def test_a_replay_may_be_faster_and_may_skip_what_nobody_saw(play: Play) -> None:
    time = Time()
    source = play(recorded("40000\n", "50000\n", "60000\n", "70000\n"), speed=2.0, clock=time.clock())
    assert temperature(source) == 40.0
    time.now_s += 0.5
    assert temperature(source) == 50.0
    time.now_s += 1.0
    assert temperature(source) == 70.0


def test_a_gated_sensor_replays_as_one_and_comes_back(play: Play) -> None:
    time = Time()
    gated = Unreadable(errno="EAGAIN")
    source = play(recorded("40000\n", gated, gated, "45000\n", None, "46000\n"), clock=time.clock())
    seen = []
    for _ in range(6):
        seen.append(temperature(source))
        time.now_s += 1
    assert seen == [40.0, None, None, 45.0, None, 46.0]


def test_a_replay_keeps_its_files_to_itself_and_removes_them(play: Play) -> None:
    source = play(recorded("40000\n"))
    assert source.root.stat().st_mode & 0o777 == 0o700
    source.close()
    assert not source.root.exists()
    source.close()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scenarios", SCENARIOS)
    module = importlib.util.module_from_spec(spec)
    # Its data classes look themselves up.
    sys.modules["scenarios"] = module
    spec.loader.exec_module(module)
    return module


def test_the_shipped_scenarios_are_what_the_script_makes(script: ModuleType) -> None:
    assert scenario_names() == sorted(script.SCENARIOS)
    for name in scenario_names():
        packed = (script.FOLDER / f"{name}.jsonl.gz").read_bytes()
        # The text, not the packed bytes: those depend on the release of zlib.
        assert gzip.decompress(packed) == b"".join(script.lines(name)), f"{name}: run scripts/scenarios.py"
        assert packed[4:8] == bytes(4), f"{name}: a time in it would make every run another file"
        assert len(packed) < 60_000
        assert "not measured" in load_recording(name).header.note


def story(play: Play, name: str) -> list[telemetry_pb2.Telemetry]:
    """Give a scenario's records, one a second."""
    time = Time()
    what = load_recording(name)
    assert 120 <= what.duration_s <= 300
    source = play(what, clock=time.clock())
    records = []
    for _ in range(int(what.duration_s) + 1):
        records.append(read(source))
        time.now_s += 1
    return records


def margins(records: list[telemetry_pb2.Telemetry]) -> list[float]:
    return [record.thermal.margin_celsius for record in records]


def energy_j(records: list[telemetry_pb2.Telemetry]) -> float:
    return sum(record.power.total_mw for record in records) / 1000


def test_heat_up_comes_near_the_trip_point_and_cools(play: Play) -> None:
    records = story(play, "heat-up")
    hottest = [record.thermal.max_celsius for record in records]
    assert hottest[0] == pytest.approx(48, abs=1)
    assert 95 < max(hottest) < 99
    assert hottest.index(max(hottest)) > 180
    assert hottest[-1] < 65
    assert records[100].power.total_mw > 4 * records[0].power.total_mw
    assert 4000 < energy_j(records) < 7000
    assert all(record.power.over_current[2].events == 0 for record in records)
    assert all(record.compute.cpu_percent > 0 for record in records[1:])


def test_over_current_counts_events_with_the_peaks_of_power(play: Play) -> None:
    records = story(play, "over-current")
    rises = [
        later.power.total_mw
        for earlier, later in pairwise(records)
        if later.power.over_current[2].events > earlier.power.over_current[2].events
    ]
    calm = [
        later.power.total_mw
        for earlier, later in pairwise(records)
        if later.power.over_current[2].events == earlier.power.over_current[2].events
    ]
    assert len(rises) > 15
    assert min(rises) > max(calm)
    assert records[-1].power.over_current[1].events > 0
    assert min(margins(records)) > 10


def test_fan_failure_passes_the_trip_point_and_the_board_throttles_itself(play: Play) -> None:
    records = story(play, "fan-failure")
    past = next(index for index, margin in enumerate(margins(records)) if margin < 0)
    assert min(margins(records)) < -0.5
    assert records[past - 5].compute.gpu_mhz == 1020
    assert min(record.compute.gpu_mhz for record in records[past:]) < 600
    assert records[-1].power.total_mw < records[past].power.total_mw
    critical = records[0].thermal.zones[0].critical_celsius
    assert max(record.thermal.max_celsius for record in records) < critical


def test_every_scenario_shows_a_whole_orin_nano(play: Play, tmp_path: Path) -> None:
    board = boards.build(tmp_path, boards.ORIN_NANO)
    for name in scenario_names():
        source = play(load_recording(name), clock=Time().clock())
        shown, model = read(source), read(open_source("sysfs", board))
        for part in ("thermal", "power", "compute", "memory"):
            fields = {field.name for field, _ in getattr(shown, part).ListFields()}
            # Nothing is swapped and nobody waits there: zeros, which are still told.
            assert fields == {field.name for field, _ in getattr(model, part).ListFields()}, (name, part)
        assert {zone.name for zone in shown.thermal.zones} == {zone.name for zone in model.thermal.zones}


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("auto", SourceChoice("auto")),
        ("sysfs", SourceChoice("sysfs")),
        ("host", SourceChoice("host")),
        ("jtop", SourceChoice("jtop")),
        ("replay:heat-up", SourceChoice("replay", "heat-up")),
        ("replay:/a/b.jsonl.gz?speed=10", SourceChoice("replay", "/a/b.jsonl.gz", 10.0)),
        ("replay:what?.jsonl", SourceChoice("replay", "what?.jsonl")),
    ],
)
def test_a_source_is_chosen_by_a_word(text: str, choice: SourceChoice) -> None:
    assert parse_source(text) == choice
    assert source_setting(text) == text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "is none of auto"),
        ("replay", "is none of auto"),
        ("replay:", "replay:heat-up"),
        ("tegrastats", "is none of auto"),
        ("replay:heat-up?speed=0", "above 0"),
        ("replay:heat-up?speed=nan", "above 0"),
        ("replay:heat-up?speed=1e9", "at most 1000"),
        ("replay:heat-up?speed=fast", "not 'fast'"),
    ],
)
def test_a_source_that_is_none_is_refused_with_the_rule(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        source_setting(text)
    with pytest.raises(EdgellmError, match=rule) as refused:
        open_source(text)
    assert "--telemetry" in refused.value.hint


def test_a_missing_recording_is_one_error_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(EdgellmError, match=f"no recording {tmp_path}/none.jsonl") as refused:
        open_source(f"replay:{tmp_path}/none.jsonl")
    assert "fan-failure, heat-up, over-current" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_word_opens_its_source(tmp_path: Path) -> None:
    board = boards.build(tmp_path, boards.THOR)
    for text, name in (("auto", "sysfs"), ("sysfs", "sysfs"), ("host", "host"), ("replay:heat-up", "replay")):
        source = open_source(text, board)
        assert source.name == name
        source.close()


def test_the_command_line_overrides_the_source_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    async def agent(settings: AgentSettings) -> None:
        run.append(settings.telemetry_source)

    monkeypatch.setattr("edgellm_agent.daemon.run", agent)
    (tmp_path / "agent.toml").write_text('telemetry_source = "host"\n')
    command = ["run", "--config", str(tmp_path / "agent.toml")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--telemetry", "replay:heat-up?speed=10"]).exit_code == 0
    assert run == ["host", "replay:heat-up?speed=10"]
    refused = CliRunner().invoke(app, [*command, "--telemetry", "tegrastats"])
    assert refused.exit_code == 1
    assert "telemetry_source" in refused.stderr
    assert "is none of auto, sysfs, host, jtop" in refused.stderr
    assert len(run) == 2
