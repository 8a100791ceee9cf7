"""`edgellm device telemetry`, `logs` and `info` say what a device says, to people and to programs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from google.protobuf import json_format
from typer.testing import CliRunner

from edgellm.cli import device as commands
from edgellm.cli import readings
from edgellm.cli.main import app
from edgellm.v1 import device_pb2, telemetry_pb2
from tests.support.orin_records import record

pytestmark = pytest.mark.usefixtures("known")


def run(*args: object):
    return CliRunner().invoke(app, ["device", *map(str, args)])


@pytest.fixture
def known(home, target):
    assert run("add", "jetson-01", target).exit_code == 0


def log_line(text: str, level: str = "INFO", second: int = 0) -> device_pb2.LogLine:
    line = device_pb2.LogLine(level=level, logger="edgellm_agent.worker", text=text)
    line.time.FromMilliseconds(1_772_366_400_123 + 1000 * second)
    return line


def figures(lines: list[str]) -> dict[str, str]:
    """Values by name; they must begin in the same column."""
    found = [re.fullmatch(r".{8}  (\S.*?) {2,}(\S.*)", line) for line in lines if line]
    assert len({match.start(2) for match in found}) == 1
    return {match[1]: match[2] for match in found}


def test_telemetry_is_one_aligned_table(device):
    device.records = [record(7)]
    lines = run("telemetry", "jetson-01").stdout.splitlines()
    assert lines[0] == "jetson-01, record 7 of 2026-03-01 12:00:07 UTC"
    facts = figures(lines[1:])
    assert facts["hottest"] == "71.5 °C"
    assert facts["to trip point"] == "27.5 °C"
    assert facts["module"] == "12.3 W"
    assert facts["GPU"] == "96 % at 918 MHz of 1020 MHz"
    assert facts["first token"] == "p50 210 ms, p95 400 ms, p99 1.30 s"
    assert facts["tokens/J"] == "3.46"
    assert facts["reasons"] == "temperature"


def test_what_is_absent_is_a_dash(device):
    device.records = [telemetry_pb2.Telemetry(sequence=1)]
    _, *lines = run("telemetry", "jetson-01").stdout.splitlines()
    assert set(figures(lines).values()) == {readings.ABSENT}


def test_json_is_the_record_in_the_words_of_the_contract_and_can_be_read_back(device):
    device.records = [record(1), record(2, celsius=73.0)]
    lines = run("telemetry", "jetson-01", "--count", 3, "--interval", 0.1, "--json").stdout.splitlines()
    read = [json_format.Parse(line, telemetry_pb2.Telemetry()) for line in lines]
    assert read == [device.records[0], device.records[1], device.records[0]]
    assert json.loads(lines[0])["thermal"]["max_celsius"] == 71.5
    assert json.loads(lines[0])["runtime"]["failed_requests_total"] == "0"


def test_in_a_pipe_each_record_is_a_line_below_one_line_of_headers(device):
    device.records = [record(1), record(2, celsius=103.25, state="CRITICAL")]
    lines = run("telemetry", "jetson-01", "--count", 2, "--interval", 0.1).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["UTC", "12:00:01", "12:00:02"]
    columns = [lines[0].index(header) for header in readings.HEADERS]
    for line in lines[1:]:
        assert all(line[column - 1] == " " != line[column] for column in columns[1:])


def test_a_device_that_sends_nothing_is_an_error_and_not_a_wait(device, monkeypatch):
    device.mute.set()
    monkeypatch.setattr("edgellm.cli.watching.ANSWER_S", 0.2)
    result = run("telemetry", "jetson-01")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "sends no telemetry" in result.stderr


def test_logs_are_lines_with_time_level_and_part(device):
    device.log = [
        log_line("one"),
        log_line("worker 7: boom", "ERROR", 1),
        log_line("\x1b[2Jthree", "INFO", 2),
    ]
    assert run("logs", "jetson-01", "--lines", 2, "--level", "warning").stdout.splitlines() == [
        "2026-03-01 12:00:01.123 ERROR   edgellm_agent.worker worker 7: boom",
        "2026-03-01 12:00:02.123 INFO    edgellm_agent.worker [2Jthree",
    ]
    (request,) = device.log_requests
    assert request == device_pb2.WatchLogsRequest(lines=2, level="WARNING")


def test_logs_in_json_are_one_object_per_line(device):
    device.log = [log_line("one"), log_line("two")]
    lines = [json.loads(line) for line in run("logs", "jetson-01", "--json").stdout.splitlines()]
    assert [line["text"] for line in lines] == ["one", "two"]
    assert lines[0]["time"] == "2026-03-01T12:00:00.123000+00:00"


def test_what_the_device_refuses_names_the_field():
    result = run("logs", "jetson-01", "--lines", 4000, "--json")
    assert json.loads(result.stderr)["error"]["field"] == "lines"
    assert run("logs", "jetson-01", "--level", "loud").exit_code == 2


def test_following_goes_on_with_new_lines_until_it_is_interrupted(device):
    device.log = [log_line("before")]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from edgellm.cli.main import main; main()"),
            *("device", "logs", "jetson-01", "--follow"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().endswith("before\n")
        device.log.append(log_line("after"))
        assert process.stdout.readline().endswith("after\n")
        process.send_signal(2)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (0, "", "")


def test_a_silent_log_is_asked_whether_its_device_is_there(device, monkeypatch):
    monkeypatch.setattr(commands, "_QUIET_S", 0.2)
    device.stalls = True
    result = run("logs", "jetson-01", "--follow")
    assert result.exit_code == 1
    assert "Deadline" in result.stderr


def test_info_shows_how_the_governor_feels_if_there_is_one(device):
    assert "governor" not in run("info", "jetson-01").stdout
    assert json.loads(run("info", "jetson-01", "--json").stdout)["governor"] is None
    device.records = [record(state="HOT")]
    assert run("info", "jetson-01").stdout.splitlines()[-1].split() == ["governor", "HOT,", "temperature"]
    assert json.loads(run("info", "jetson-01", "--json").stdout)["governor"]["state"] == "HOT"


def audit_record(sequence: int, **changes: str) -> device_pb2.AuditRecord:
    record = device_pb2.AuditRecord(
        sequence=sequence,
        caller="uid 1000",
        role="operator",
        method="EngineService/Activate",
        subject="sha256:1",
        outcome="OK",
        previous="5e8f",
    )
    record.MergeFrom(device_pb2.AuditRecord(**changes))
    record.time.FromSeconds(1_772_366_400 + sequence)
    return record


def test_whoami_says_who_one_is_and_in_which_role():
    assert run("whoami", "jetson-01").stdout.splitlines() == ["caller  uid 1000", "role    operator"]
    assert json.loads(run("whoami", "jetson-01", "--json").stdout) == {
        "caller": "uid 1000",
        "role": "operator",
    }


def test_the_audit_log_is_a_table_of_its_last_records(device):
    device.audit = [
        audit_record(1),
        audit_record(2, caller="certificate eve", role="viewer", outcome="PERMISSION_DENIED"),
        audit_record(3, subject="\x1b[2Jtwo"),
    ]
    assert run("audit", "jetson-01", "--limit", 2).stdout.splitlines() == [
        "TIME                 CALLER           ROLE      METHOD                  SUBJECT   OUTCOME",
        "2026-03-01 12:00:02  certificate eve  viewer    EngineService/Activate  sha256:1  PERMISSION_DENIED",
        "2026-03-01 12:00:03  uid 1000         operator  EngineService/Activate  [2Jtwo    OK",
    ]


def test_the_audit_log_in_json_is_one_record_per_line(device):
    device.audit = [audit_record(1), audit_record(2)]
    lines = [json.loads(line) for line in run("audit", "jetson-01", "--json").stdout.splitlines()]
    assert [line["sequence"] for line in lines] == [1, 2]
    assert lines[0] == {
        "sequence": 1,
        "time": "2026-03-01T12:00:01+00:00",
        "caller": "uid 1000",
        "role": "operator",
        "method": "EngineService/Activate",
        "subject": "sha256:1",
        "outcome": "OK",
        "previous": "5e8f",
    }


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_audit_log_that_was_changed_is_printed_and_then_told_of(device, options):
    device.audit, device.audit_was_changed = [audit_record(1)], True
    result = run("audit", "jetson-01", *options)
    assert result.exit_code == 1
    assert "EngineService/Activate" in result.stdout
    assert "was changed" in result.stderr


def test_an_audit_log_without_records_prints_nothing():
    result = run("audit", "jetson-01")
    assert (result.exit_code, result.stdout) == (0, "")
