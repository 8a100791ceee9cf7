"""jetson-stats in its helper process: real processes and pipes, over a stand-in for its module.

The last test runs over the real package where it is installed; it is AGPL and no dependency of the tests.
"""

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm.errors import EdgellmError
from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.detect import open_source
from edgellm_agent.telemetry.jtop import JtopSource, Patience
from tests.support import boards

FAKE = str(Path(boards.__file__).parent / "fake_jtop")
SOON_S = 30.0
Begin = Callable[..., JtopSource]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Start a source over a stand-in of some manner; it is closed in the end."""
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.setenv("PYTHONPATH", FAKE, prepend=os.pathsep)
    monkeypatch.setenv("FAKE_JTOP_PID", str(tmp_path / "pid"))
    board = boards.build(tmp_path / "board", boards.ORIN_NANO)
    with contextlib.ExitStack() as stack:

        def start(manner: str, **options: object) -> JtopSource:
            monkeypatch.setenv("FAKE_JTOP", manner)
            return stack.enter_context(contextlib.closing(JtopSource(board, **options)))

        yield start


def read(source: JtopSource) -> telemetry_pb2.Telemetry:
    record = telemetry_pb2.Telemetry()
    for probe in source.probes:
        if (part := probe.read()) is not None:
            getattr(record, probe.part).CopyFrom(part)
    return record


def ends(pid: int) -> bool:
    """Whether a process that is no child of ours is gone soon."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watched], [], [], SOON_S)[0])
    finally:
        os.close(watched)


def test_a_sample_becomes_a_record_in_our_units_with_trip_points_and_counters_of_the_kernel(
    begin: Begin,
) -> None:
    source = begin("works")
    assert source.wait_for(lambda: source.has_news, SOON_S)
    record = read(source)
    zones = {zone.name: (zone.celsius, zone.passive_celsius) for zone in record.thermal.zones}
    # By the kernel's names where it has the zone; a drive has no trip point, a sensor that is off is absent.
    assert zones == {"cpu-thermal": (48.5, 99.0), "tj-thermal": (50.25, 99.0), "nvme Composite": (41.85, 0.0)}
    assert (record.thermal.max_celsius, record.thermal.margin_celsius) == (50.25, 48.75)
    assert {rail.name: rail.power_mw for rail in record.power.rails} == {
        "VDD_CPU_GPU_CV": 887,
        "VDD_SOC": 1529,
        "VDD_IN": 4959,
    }
    assert (record.power.total_mw, record.power.mode) == (4959, "25W")
    assert [counter.events for counter in record.power.over_current] == [0, 3, 1]
    compute = record.compute
    assert (compute.cpu_percent, compute.cpu_mhz, compute.gpu_percent) == (25.0, 1500.0, 37.5)
    assert (compute.gpu_mhz, compute.gpu_max_mhz) == (306.0, 1020.0)
    # What is available is the kernel's word: jtop's "free" and "used" are something else.
    assert record.memory.available_bytes == 5_321_000 * 1024


def test_what_the_library_tells_in_another_shape_is_left_out(begin: Begin) -> None:
    source = begin("is-odd")
    assert source.wait_for(lambda: source.has_news, SOON_S)
    record = read(source)
    assert [zone.name for zone in record.thermal.zones] == ["cpu-thermal", "tj-thermal", "nvme Composite"]
    assert not record.power.rails
    assert not record.power.HasField("total_mw")
    assert not record.compute.HasField("cpu_percent")
    assert not record.compute.HasField("cpu_mhz")
    assert record.compute.gpu_percent == 37.5


def test_what_the_library_prints_does_not_mix_with_samples(begin: Begin) -> None:
    source = begin("prints")
    assert source.wait_for(lambda: source.has_news, SOON_S)
    assert source.failure == ""
    assert read(source).power.total_mw == 4959


def test_a_start_that_hangs_is_ended_at_its_deadline_with_its_process(begin: Begin, tmp_path: Path) -> None:
    source = begin("hangs", patience=Patience(start_s=3.0, first_retry_s=60.0))
    assert source.wait_for(lambda: source.failure != "", SOON_S)
    assert source.failure == "it said nothing for 3 s"
    assert ends(int((tmp_path / "pid").read_text()))
    record = read(source)
    assert not record.HasField("thermal")
    assert not record.HasField("compute")
    # The kernel's own files are read all the same.
    assert len(record.power.over_current) == 3
    assert record.memory.total_bytes > 0


def test_a_refusal_of_the_service_is_told_and_it_is_tried_again(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = begin("refuses", patience=Patience(first_retry_s=0.05))
    assert source.wait_for(lambda: source.failure != "", SOON_S)
    assert source.failure.startswith("JtopException: The jtop.service is not active.")
    # The next helper finds the service up.
    monkeypatch.setenv("FAKE_JTOP", "works")
    assert source.wait_for(lambda: source.failure == "" and source.has_news, SOON_S)
    assert read(source).power.mode == "25W"


def test_a_helper_that_falls_silent_is_replaced_and_its_last_sample_no_longer_shown(
    begin: Begin, tmp_path: Path
) -> None:
    source = begin("falls-silent", patience=Patience(silence_s=0.5, first_retry_s=60.0))
    assert source.wait_for(lambda: source.failure != "", SOON_S)
    assert source.failure == "it said nothing for 0.5 s"
    assert not read(source).HasField("thermal")
    assert ends(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("print('nonsense')", "has no sense"),
        ('print(\'{"zones": {"cpu": 1e9}, "rails": {}}\')', "zones.cpu"),
        ('print(\'{"zones": {}, "rails": {"VIN": {"mw": NaN}}}\')', "has no sense"),
        ("print('x' * 1_000_000)", "longer than"),
        ("pass", "ended without a word"),
    ],
)
def test_a_helper_that_breaks_its_word_gives_a_reason_but_no_figures(
    begin: Begin, does: str, reason: str
) -> None:
    command = (sys.executable, "-c", does)
    source = begin("works", helper=command, patience=Patience(first_retry_s=60.0))
    assert source.wait_for(lambda: source.failure != "", SOON_S)
    assert reason in source.failure
    assert not read(source).HasField("thermal")


def test_closing_ends_the_helper_whatever_it_is_doing(begin: Begin, tmp_path: Path) -> None:
    source = begin("works")
    assert source.wait_for(lambda: source.has_news, SOON_S)
    pid = int((tmp_path / "pid").read_text())
    source.close()
    source.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_helper_ends_when_its_parent_is_killed(begin: Begin, tmp_path: Path) -> None:
    program = (
        "from edgellm_agent.telemetry.jtop import JtopSource\n"
        "source = JtopSource()\n"
        "print(source.wait_for(lambda: source.has_news, 30), flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout.readline() == "True\n"
        parent.send_signal(signal.SIGKILL)
    assert ends(int((tmp_path / "pid").read_text()))


def test_without_jetson_stats_one_error_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jtop" else real(name))
    with pytest.raises(EdgellmError, match="needs jetson-stats") as refused:
        open_source("jtop")
    assert "pip install 'edgellm[jetson]'" in refused.value.hint


@pytest.mark.skipif(importlib.util.find_spec("jtop") is None, reason="jetson-stats is not installed")
def test_the_real_jetson_stats_says_without_its_service_why_it_does_not_start() -> None:
    with contextlib.closing(JtopSource()) as source:
        assert source.wait_for(lambda: source.has_news, SOON_S)
        assert source.failure.startswith("JtopException: ")
