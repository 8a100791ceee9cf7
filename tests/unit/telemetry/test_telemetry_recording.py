"""Recordings of a board: taken by the real readers' lists, read strictly, and without anything personal."""

import asyncio
import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import EdgellmError
from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry import recording
from edgellm_agent.telemetry.base import Clock, Source
from edgellm_agent.telemetry.recorder import Recorder, take
from edgellm_agent.telemetry.recording import (
    Header,
    Recording,
    RecordingError,
    Snapshot,
    Unreadable,
    changes,
    encoded,
    load,
)
from edgellm_agent.telemetry.replay import ReplaySource, write_tree
from edgellm_agent.telemetry.sysfs import SysfsSource
from tests.support import boards, virtual_time

HEADER = Header(board="a-board", kernel="6.1", l4t="R36.4.3", started="2026-01-01T00:00:00+00:00")
ZONE = "sys/class/thermal/thermal_zone0/temp"


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


def switch_a_channel_off(root: Path) -> None:
    min(root.glob("sys/bus/i2c/devices/*/hwmon/*/in2_enable")).write_text("0\n")


def disturb(root: Path) -> None:
    """Let a second pass on a board: warmer, busier, with an event, and with sensors that come and go."""
    boards.write(root, "sys/class/thermal/thermal_zone0/temp", "61500\n")
    boards.cpu_busy(root, busy=1025, idle=9075)
    boards.write(root, "sys/class/hwmon/hwmon4/oc3_event_cnt", "7\n")
    boards.write(root, "var/lib/nvpmodel/status", "pmode:0002\n")
    last = max((root / "sys/class/thermal").iterdir()) / "temp"
    last.unlink()
    # A file that opens and then answers with an error, as a gated zone does.
    last.symlink_to("/proc/self/mem")
    (root / "proc/pressure/memory").unlink()


@pytest.mark.parametrize("name", boards.BOARDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_replayed_recording_gives_the_records_that_the_board_gave(
    tmp_path: Path, name: str, suffix: str
) -> None:
    root = boards.build(tmp_path / "board", boards.BOARDS[name])
    time = Time()
    board, recorder = SysfsSource(root, time.clock()), Recorder(root, time.clock())
    given_records = []
    for change in (switch_a_channel_off, disturb):
        change(root)
        recorder.snapshot()
        given_records.append(read(board))
        time.now_s += 1
    recorder.save(tmp_path / f"board{suffix}")
    recorded = load(tmp_path / f"board{suffix}")
    assert recorded.header.board.startswith("nvidia,p")
    replay = ReplaySource(recorded, clock=time.clock())
    replayed = [read(replay)]
    time.now_s += 1
    replayed.append(read(replay))
    replay.close()
    assert replayed == given_records
    assert given_records[1].power.mode == boards.BOARDS[name].modes[2]
    assert given_records[1].compute.cpu_percent == 25.0
    assert not given_records[1].memory.HasField("pressure_some_percent")


def test_a_snapshot_holds_only_what_changed_and_how_a_file_failed(tmp_path: Path) -> None:
    root = boards.build(tmp_path / "board", boards.ORIN_NANO)
    time = Time()
    recorder = Recorder(root, time.clock())
    recorder.snapshot()
    disturb(root)
    time.now_s += 1.5
    recorder.snapshot()
    recorder.save(tmp_path / "r.jsonl")
    second = load(tmp_path / "r.jsonl").snapshots[1]
    assert second.t_s == 1.5
    assert second.files == {
        ZONE: "61500\n",
        "sys/class/thermal/thermal_zone8/temp": Unreadable(errno="EIO"),
        "sys/class/hwmon/hwmon4/oc3_event_cnt": "7\n",
        "var/lib/nvpmodel/status": "pmode:0002\n",
        "proc/stat": "cpu  1025 0 0 9075 0 0 0 0 0 0\n",
        "proc/pressure/memory": None,
    }


def test_nothing_personal_is_recorded(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.ORIN_NANO)
    boards.write(root, "proc/device-tree/serial-number", "1424523011111\0")
    boards.write(
        root, "proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/home/alice/swap\\040file file 8 0 -2\n"
    )
    boards.write(root, "etc/nvpmodel.conf", "# tuned by alice\n< POWER_MODEL ID=0 NAME=15W >\n")
    boards.write(root, "proc/meminfo", "MemTotal: 10 kB\nMemAvailable: 5 kB\nHugetlb: 77 kB\n")
    taken = take(root)
    text = json.dumps({path: str(content) for path, content in taken.items()})
    assert "alice" not in text
    assert "1424523011111" not in text
    assert taken["proc/swaps"].endswith("\n/swapfile file 8 0 -2\n")
    assert taken["proc/meminfo"] == "MemTotal: 10 kB\nMemAvailable: 5 kB\n"
    assert "\nintr" not in taken["proc/stat"]


def test_recording_takes_a_snapshot_an_interval_for_as_long_as_it_is_asked(tmp_path: Path) -> None:
    root = boards.build(tmp_path / "board", boards.ORIN_NANO)
    progress: list[float] = []

    async def record() -> Recorder:
        loop = asyncio.get_running_loop()
        recorder = Recorder(root, Clock(monotonic_ns=lambda: round(loop.time() * 1e9)))
        await recorder.run(60.0, 0.5, progress.append)
        return recorder

    recorder = virtual_time.run(record())
    recorder.save(tmp_path / "r.jsonl.gz")
    recorded = load(tmp_path / "r.jsonl.gz")
    assert [snapshot.t_s for snapshot in recorded.snapshots[:-1]] == [index / 2 for index in range(120)]
    assert recorded.duration_s == pytest.approx(60, abs=0.01)
    assert progress == sorted(progress)
    assert progress[-1] == 60


def test_a_recording_that_is_full_ends_and_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = boards.build(tmp_path / "board", boards.ORIN_NANO)
    monkeypatch.setattr("edgellm_agent.telemetry.recorder.MAX_SNAPSHOTS", 5)

    async def record() -> Recorder:
        loop = asyncio.get_running_loop()
        recorder = Recorder(root, Clock(monotonic_ns=lambda: round(loop.time() * 1e9)))
        await recorder.run(60.0, 1.0, lambda _: None)
        return recorder

    virtual_time.run(record()).save(tmp_path / "r.jsonl")
    assert [snapshot.t_s for snapshot in load(tmp_path / "r.jsonl").snapshots] == [0, 1, 2, 3, 4]


def test_a_recording_of_too_many_snapshots_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_SNAPSHOTS", 2)
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join([GOOD, line(0.0), line(1.0)]))
    assert len(load(file).snapshots) == 2
    file.write_text("\n".join([GOOD, line(0.0), line(1.0), line(2.0)]))
    with pytest.raises(RecordingError, match="line 4: t_s: more than 2 snapshots"):
        load(file)


def test_a_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    recorder = Recorder(boards.build(tmp_path / "board", boards.ORIN_NANO), Time().clock())
    recorder.snapshot()
    file = tmp_path / "mine.jsonl"
    file.write_text("mine")
    with pytest.raises(EdgellmError, match="exists already"):
        recorder.save(file)
    assert file.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"board", "mine.jsonl"}


def test_a_recording_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(boards.build(tmp_path / "board", boards.ORIN_NANO), Time().clock())
    recorder.snapshot()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        recorder.save(tmp_path / "r.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"board"}


def line(t_s: object = 0.0, files: object = None) -> str:
    return json.dumps({"t_s": t_s, "files": {ZONE: "45000\n"} if files is None else files})


def numbered(start: int, end: int) -> dict[str, str]:
    return {f"sys/{number}": "" for number in range(start, end)}


GOOD = encoded(HEADER).decode().strip()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "line 1: JSON"),
        (["not JSON"], "line 1: JSON"),
        (['{"format": "something else"}'], "line 1: format"),
        ([GOOD.replace('"version":1', '"version":2')], "line 1: version"),
        ([GOOD.replace('"l4t":', '"serial":"1","l4t":')], "line 1: serial"),
        ([GOOD], "line 2: t_s: there is no snapshot"),
        ([GOOD, line(1.0)], "line 2: t_s: must be 0"),
        ([GOOD, line(-1.0)], "line 2: t_s"),
        ([GOOD, '{"t_s": NaN, "files": {}}'], "line 2: t_s"),
        ([GOOD, '{"t_s": 1e999, "files": {}}'], "line 2: t_s"),
        ([GOOD, line("0")], "line 2: t_s"),
        ([GOOD, line(0.0), line(0.0)], "line 3: t_s: must be later than 0"),
        ([GOOD, line(0.0), line(2.0), line(1.0)], "line 4: t_s: must be later than 2"),
        ([GOOD, line(files={"/etc/passwd": "x"})], "line 2: files"),
        ([GOOD, line(files={"sys/../../etc/passwd": "x"})], "line 2: files"),
        ([GOOD, line(files={"sys/./a": "x"})], "line 2: files"),
        ([GOOD, line(files={"sys//a": "x"})], "line 2: files"),
        ([GOOD, line(files={"home/alice/.ssh/authorized_keys": "x"})], "line 2: files"),
        ([GOOD, line(files={"sys/a\0b": "x"})], "line 2: files"),
        ([GOOD, line(files={"sys": "x"})], "line 2: files"),
        ([GOOD, line(files={"sys/" + "a" * 200: "x"})], "line 2: files"),
        ([GOOD, line(files={"sys" + "/a" * 20: "x"})], "line 2: files"),
        ([GOOD, line(files={ZONE: 45000})], f"line 2: files.{ZONE}"),
        ([GOOD, line(files={ZONE: {"errno": "rm -rf"}})], f"line 2: files.{ZONE}"),
        ([GOOD, line(files={ZONE: "9" * 70_000})], f"line 2: files.{ZONE}"),
        ([GOOD, line(files={"sys/a": "x", "sys/a/b": "x"})], "line 2: files.sys/a/b: is a file and a folder"),
        (
            [GOOD, line(files={"sys/a/b": "x"}), line(1.0, {"sys/a": "x"})],
            "line 3: files.sys/a: is a file",
        ),
        ([GOOD, line(files={"sys/a": "x"}), line(1.0, {"sys/a/b": None})], "line 3: files.sys/a/b"),
        ([GOOD, line(files=numbered(0, 5000))], "line 2: files"),
        (
            [GOOD, line(files=numbered(0, 4000)), line(1.0, numbered(4000, 5000))],
            "line 3: files.sys/4096: is a file and a folder, or one file too many",
        ),
        ([GOOD, '{"t_s": 0, "files": ' + "[" * 5000 + "]" * 5000 + "}"], "line 2"),
    ],
)
def test_a_recording_that_is_wrong_is_refused_with_the_line_and_the_field(
    tmp_path: Path, lines: list[str], complaint: str
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(RecordingError, match=f"r.jsonl: {re.escape(complaint)}") as refused:
        load(file)
    assert refused.value.hint
    assert len(str(refused.value)) < 700


def test_what_is_too_large_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(bytes(80 << 20), 1))
    with pytest.raises(RecordingError, match="bytes in a line"):
        load(bomb)
    many = tmp_path / "many.jsonl.gz"
    filler = [line(float(second), {ZONE: "x" * 60_000}) for second in range(1200)]
    many.write_bytes(gzip.compress("\n".join([GOOD, *filler]).encode(), 1))
    with pytest.raises(RecordingError, match="in all"):
        load(many)


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b", b"\x1f\x8b\x08\x00garbage", gzip.compress(b"x" * 999)[:-9], b"\xff\xfe\n"]
)
def test_bytes_that_are_no_recording_give_the_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r").write_bytes(content)
    with pytest.raises(RecordingError):
        load(tmp_path / "r")
    with pytest.raises(RecordingError, match="cannot be read"):
        load(tmp_path)
    with pytest.raises(RecordingError, match="cannot be read"):
        load(tmp_path / "nowhere")


PATHS = st.sampled_from([ZONE, "proc/stat", "etc/nvpmodel.conf", "sys/a/b", "sys/a/c", "var/lib/x"])
TEXTS = st.text(max_size=40).filter(lambda text: not any(0xD800 <= ord(char) < 0xE000 for char in text))
CONTENTS = TEXTS | st.builds(Unreadable, errno=st.sampled_from(["EAGAIN", "EIO", "EINVAL"]))
STATES = st.lists(st.dictionaries(PATHS, CONTENTS), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(states=STATES)
def test_changes_written_and_read_back_lead_through_the_same_states(
    tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, recording.Content]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    befores: list[dict[str, recording.Content]] = [{}, *states[:-1]]
    snapshots = [
        Snapshot(t_s=float(second), files=changes(before, after))
        for second, (before, after) in enumerate(zip(befores, states, strict=True))
    ]
    (folder / "r").write_bytes(b"".join(map(encoded, (HEADER, *snapshots))))
    for snapshot, state in zip(load(folder / "r").snapshots, states, strict=True):
        write_tree(folder / "tree", snapshot.files)
        assert shown(folder / "tree", state) == state


def shown(root: Path, state: dict[str, recording.Content]) -> dict[str, recording.Content]:
    """Give what a tree has at the paths that may occur, its own kind of unreadable as the state's."""
    found: dict[str, recording.Content] = {}
    for path in (ZONE, "proc/stat", "etc/nvpmodel.conf", "sys/a/b", "sys/a/c", "var/lib/x"):
        if (root / path).is_dir():
            wanted = state.get(path)
            found[path] = wanted if isinstance(wanted, Unreadable) else Unreadable(errno="EISDIR")
        elif (root / path).exists():
            found[path] = (root / path).read_bytes().decode()
    return found


def whole_or_refused(file: Path) -> Recording | None:
    try:
        return load(file)
    except RecordingError as error:
        assert str(error).startswith(str(file))  # noqa: PT017 - either is right
        return None


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200), packed=st.booleans())
def test_any_bytes_are_a_recording_or_the_one_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, packed: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(gzip.compress(content) if packed else content)
    assert whole_or_refused(file) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ODD_LINE = st.dictionaries(st.sampled_from(["t_s", "files", "x"]), JSON, max_size=3)
ODD_PATH = st.text(max_size=30) | st.sampled_from(["sys/a", "sys/a/b", "../x"])
ODD_FILES = st.dictionaries(ODD_PATH, JSON, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    tail=st.lists(ODD_LINE | st.builds(lambda files: {"t_s": 0.0, "files": files}, ODD_FILES), max_size=3),
    cut=st.integers(0, 300),
)
def test_whatever_a_line_holds_a_recording_is_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tail: list[object], cut: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "odd"
    text = "\n".join([GOOD, *(json.dumps(each) for each in tail)])
    file.write_text(text[: len(text) - cut] if cut < 50 else text)
    if (found := whole_or_refused(file)) is not None:
        assert found.snapshots[0].t_s == 0
        tree = tmp_path_factory.mktemp("odd") / "tree"
        for snapshot in found.snapshots:
            write_tree(tree, snapshot.files)
        assert all(path.is_relative_to(tree) for path in tree.rglob("*"))
