"""`edgellm-agent doctor`: what a machine tells, what not and why, and recordings for its owner."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgellm_agent.main import app
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.recording import load
from tests.support import boards


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass by sleeping alone, and at once."""
    now_ns = [0]

    async def sleep(seconds: float) -> None:
        now_ns[0] += round(seconds * 1e9)

    clock = Clock(monotonic_ns=lambda: now_ns[0], sleep=sleep)
    monkeypatch.setattr("edgellm_agent.main.Clock", lambda: clock)


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def findings(result: Result) -> dict[str, tuple[str, str]]:
    told = json.loads(result.stdout)
    return {
        f"{each['part']} {each['figure']}": (each["state"], f"{each['detail']}; {each['advice']}")
        for each in told["findings"]
    }


def test_a_whole_board_is_told_in_one_aligned_table(tmp_path: Path) -> None:
    result = doctor("--root", boards.build(tmp_path, boards.ORIN_NANO))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["source", "sysfs"]
    assert lines[1].split() == ["board", "nvidia,p3768-0000+p3767-0005"]
    assert lines[2].split() == ["L4T", "R36.4.3"]
    assert lines[3].split()[0] == "sandbox"
    table = lines[5:]
    columns = [table[0].index(title) for title in ("PART", "FIGURE", "STATE", "DETAIL")]
    assert all(line[column - 1] == " " for line in table for column in columns[1:])
    assert "temperature   ok      6 zones, hottest tj-thermal 49.2 °C" in result.stdout
    assert "under_voltage 0, average 3, instantaneous 1" in result.stdout


def test_what_a_board_does_not_have_is_absent_and_no_fault(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.THOR)
    (root / "proc/pressure/memory").unlink()
    result = doctor("--root", root, "--json")
    assert result.exit_code == 0
    told = findings(result)
    assert told["thermal margin"][0] == "absent"
    assert "no sys/devices/platform/gpu.0/load" in told["compute gpu load"][1]
    state, why = told["memory pressure"]
    assert state == "absent"
    assert why.startswith("no proc/pressure/memory; the kernel needs CONFIG_PSI, and psi=1")
    assert json.loads(result.stdout)["healthy"] is True


def test_what_the_agent_needs_and_a_board_lacks_is_a_fault(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.ORIN_NANO)
    (root / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_input").unlink()
    (root / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_input").mkdir()
    result = doctor("--root", root, "--json")
    assert result.exit_code == 1
    state, why = findings(result)["power total"]
    assert state == "missing"
    assert "hwmon1/curr1_input: Is a directory; switched off at the moment, or broken" in why


def test_a_refused_right_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = boards.build(tmp_path, boards.ORIN_NANO)
    opening = os.open

    def guarded(path: object, *arguments: int) -> int:
        if str(path).endswith("_event_cnt"):
            raise PermissionError(13, "Permission denied")
        return opening(path, *arguments)

    monkeypatch.setattr(os, "open", guarded)
    state, why = findings(doctor("--root", root, "--json"))["power over-current"]
    assert state == "absent"
    assert (
        why
        == "no right to read sys/class/hwmon/hwmon4/oc1_event_cnt; run the agent as a user who may read it"
    )


def test_a_laptop_is_healthy_without_power_figures(tmp_path: Path) -> None:
    result = doctor("--root", tmp_path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["source"] == "host"
    assert findings(result)["power total"] == ("absent", "the source host does not tell it; ")


def test_a_replay_is_examined_like_the_board_that_it_shows() -> None:
    result = doctor("--telemetry", "replay:heat-up")
    assert result.exit_code == 0
    assert "nvidia,p3768-0000+p3767-0005" in result.stdout


def test_a_source_that_is_none_is_refused() -> None:
    result = doctor("--telemetry", "tegrastats")
    assert result.exit_code == 1
    assert "error: telemetry source: 'tegrastats' is none of auto, sysfs, host, jtop" in result.stderr
    assert "try: correct telemetry_source" in result.stderr


def test_an_owner_records_a_board_and_is_told_what_is_in_the_file(tmp_path: Path) -> None:
    root = boards.build(tmp_path / "board", boards.AGX_ORIN)
    file = tmp_path / "agx.jsonl.gz"
    result = doctor("--root", root, "--record-sysfs", file, "--seconds", 30)
    assert result.exit_code == 0, result.output
    assert "no serial number, name, address or process" in result.stdout
    recorded = load(file)
    assert (recorded.header.board, recorded.header.l4t, recorded.header.kernel) == (
        "nvidia,p3737-0000+p3701-0005",
        "R35.6.0",
        "5.10.216-tegra",
    )
    assert len(recorded.snapshots) == 31
    again = doctor("--root", root, "--record-sysfs", file)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    assert load(file) == recorded
    nowhere = doctor("--root", root, "--record-sysfs", tmp_path / "no/where.jsonl")
    assert nowhere.exit_code == 1
    assert "there is no folder" in nowhere.stderr


def test_an_interrupted_recording_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgellm_agent.main.Clock", lambda: Clock(sleep=interrupted))
    root = boards.build(tmp_path / "board", boards.ORIN_NANO)
    result = doctor("--root", root, "--record-sysfs", tmp_path / "r.jsonl", "--seconds", 60)
    assert result.exit_code == 0, result.output
    assert len(load(tmp_path / "r.jsonl").snapshots) == 1


def test_a_jtop_that_does_not_start_is_told_once_and_what_the_kernel_tells_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = str(Path(boards.__file__).parent / "fake_jtop")
    monkeypatch.syspath_prepend(fake)
    monkeypatch.setenv("PYTHONPATH", fake, prepend=os.pathsep)
    monkeypatch.setenv("FAKE_JTOP", "refuses")
    root = boards.build(tmp_path, boards.ORIN_NANO)
    result = doctor("--telemetry", "jtop", "--root", root)
    assert result.exit_code == 1
    assert result.stdout.count("The jtop.service is not active. Please run: sudo jtop --install-service") == 1
    assert "under_voltage 0, average 3, instantaneous 1" in result.stdout


def test_a_wedged_sensor_is_a_fault_and_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm_agent.doctor._READ_S", 0.5)
    root = boards.build(tmp_path, boards.ORIN_NANO)
    wedged = root / "sys/class/thermal/thermal_zone0/temp"
    wedged.unlink()
    os.mkfifo(wedged)  # opening it for reading waits for a writer
    told = findings(doctor("--root", root, "--json"))
    assert told["thermal temperature"] == (
        "missing",
        "reading the thermal part did not end within 0.5 s; look for its driver in the kernel's log",
    )
    assert told["power total"][0] == "ok"
    # Lets the thread that was left behind end.
    os.close(os.open(wedged, os.O_RDWR))
