"""The source of a machine that is no Jetson."""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.host import HostSource


class Reading(NamedTuple):
    label: str
    current: float
    high: float | None
    critical: float | None


class Times(NamedTuple):
    user: float
    idle: float
    iowait: float
    guest: float


def part(source: HostSource, name: str) -> object:
    return next(probe for probe in source.probes if probe.part == name).read()


def test_this_machine_tells_memory_and_no_power() -> None:
    source = HostSource()
    memory = part(source, "memory")
    assert isinstance(memory, telemetry_pb2.Memory)
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert "power" not in {probe.part for probe in source.probes}


def test_sensors_that_say_nothing_sensible_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {
        "coretemp": [Reading("Core 0", 55.0, 80.0, 100.0), Reading("Core 1", float("nan"), None, None)],
        "nvme": [Reading("", 41.5, None, 65_261.85)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: readings, raising=False)
    thermal = part(HostSource(), "thermal")
    assert isinstance(thermal, telemetry_pb2.Thermal)
    assert [(zone.name, zone.celsius) for zone in thermal.zones] == [
        ("coretemp/Core 0", 55.0),
        ("nvme", 41.5),
    ]
    assert [zone.HasField("critical_celsius") for zone in thermal.zones] == [True, False]
    assert thermal.max_celsius == 55.0


def test_a_machine_without_sensors_has_no_thermal_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    assert part(HostSource(), "thermal") is None


def test_load_is_the_share_since_the_last_record_and_a_frequency_of_zero_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([Times(10, 90, 0, 10), Times(40, 150, 10, 40)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(times))
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=0.0))
    source = HostSource(Path("/nowhere"))
    first, second = part(source, "compute"), part(source, "compute")
    assert isinstance(first, telemetry_pb2.Compute)
    assert isinstance(second, telemetry_pb2.Compute)
    assert not first.HasField("cpu_percent")
    # 30 of 100 were busy; guest time is not counted twice.
    assert second.cpu_percent == 30.0
    assert not second.HasField("cpu_mhz")
