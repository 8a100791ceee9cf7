"""The source where there is no Jetson: a laptop or a build machine, through psutil; it knows no power."""

import math
from pathlib import Path
from typing import Any

import psutil

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import PartName, Probe
from edgellm_agent.telemetry.compute import CpuShare
from edgellm_agent.telemetry.memory import pressure_some_percent


class _Thermal:
    part: PartName = "thermal"

    def read(self) -> telemetry_pb2.Thermal | None:
        # psutil has it on Linux and FreeBSD only.
        sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
        thermal = telemetry_pb2.Thermal()
        for chip, readings in sensors.items():
            for reading in readings:
                if _plausible(reading.current):
                    thermal.zones.add(
                        name=f"{chip}/{reading.label}" if reading.label else chip,
                        celsius=reading.current,
                        critical_celsius=reading.critical if _plausible(reading.critical) else None,
                    )
        if not thermal.zones:
            return None
        thermal.max_celsius = max(zone.celsius for zone in thermal.zones)
        return thermal


class _Compute:
    part: PartName = "compute"

    def __init__(self) -> None:
        self._share = CpuShare()

    def read(self) -> telemetry_pb2.Compute | None:
        # psutil.cpu_percent remembers per thread, and the sampler's threads come and go.
        times = psutil.cpu_times()._asdict()
        idle = times["idle"] + times.get("iowait", 0.0)
        # Linux counts guest time in user time, too.
        total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        frequency = psutil.cpu_freq()
        mhz = frequency.current if frequency is not None else 0.0
        # A virtual machine knows no frequency and says zero.
        return telemetry_pb2.Compute(
            cpu_percent=self._share.since_last(idle, total), cpu_mhz=round(mhz, 1) if mhz > 0 else None
        )


class _Memory:
    part: PartName = "memory"

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self) -> telemetry_pb2.Memory:
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        return telemetry_pb2.Memory(
            total_bytes=memory.total,
            available_bytes=memory.available,
            swap_total_bytes=swap.total,
            swap_used_bytes=swap.used,
            pressure_some_percent=pressure_some_percent(self._root),
        )


class HostSource:
    """Temperatures, processors and memory of this machine."""

    name = "host"

    def __init__(self, root: Path = Path("/")) -> None:
        self.probes: tuple[Probe, ...] = (_Thermal(), _Compute(), _Memory(root))

    def close(self) -> None:
        """Nothing is held open."""


def _plausible(celsius: float | None) -> bool:
    return celsius is not None and math.isfinite(celsius) and -60 <= celsius <= 200
