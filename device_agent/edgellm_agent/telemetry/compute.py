"""Reads how busy and how fast the processors are."""

from dataclasses import dataclass
from pathlib import Path

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, PartName
from edgellm_agent.telemetry.files import Discovery, Wanted, natural, read_number, read_text

# The integrated GPU by JetPack release and chip: Orin, Orin before JetPack 6, Thor.
_GPU_CLOCKS = ("17000000.gpu", "17000000.ga10b", "gpu-gpc-0")
_GPU_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/gpu.0/load",
    *(f"sys/class/devfreq/{name}/device/load" for name in _GPU_CLOCKS),
)
_CPU_CLOCKS = "sys/devices/system/cpu/cpufreq"
FILES = (
    Wanted("proc/stat", lines="cpu "),
    Wanted(f"{_CPU_CLOCKS}/policy*/scaling_cur_freq"),
    *(Wanted(path) for path in _GPU_LOADS),
    *(Wanted(f"sys/class/devfreq/{name}/{end}_freq") for name in _GPU_CLOCKS for end in ("cur", "max")),
)
_MAX_KHZ, _MAX_HZ = 10_000_000, 10_000_000_000


@dataclass(frozen=True)
class _Nodes:
    cpu_clocks: tuple[Path, ...]
    gpu_load: Path | None
    gpu_clock: Path | None


class CpuShare:
    """Turns counters of busy and all time into the share that was busy since the last call."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def since_last(self, idle: float, total: float) -> float | None:
        """Give percent, 0 to 100; None on the first call and where no time has passed."""
        last, self._last = self._last, (idle, total)
        if last is None or total <= last[1]:
            return None
        # The kernel's count of waiting for input and output may go back.
        return round(min(max(100 * (1 - (idle - last[0]) / (total - last[1])), 0.0), 100.0), 1)


class ComputeProbe:
    """`/proc/stat`, cpufreq, and the GPU's load and devfreq nodes."""

    part: PartName = "compute"

    def __init__(self, root: Path, clock: Clock) -> None:
        self._stat = root / "proc/stat"
        self._nodes = Discovery(lambda: _nodes(root), clock)
        self._share = CpuShare()

    def read(self) -> telemetry_pb2.Compute | None:
        """Give what answers; None if nothing does."""
        nodes = self._nodes.get()
        compute = telemetry_pb2.Compute(
            cpu_percent=self._cpu_percent(),
            cpu_mhz=self._cpu_mhz(nodes),
            gpu_percent=self._number(nodes.gpu_load, 1000, unit=10),
        )
        if nodes.gpu_clock is not None:
            for field, name in (("gpu_mhz", "cur_freq"), ("gpu_max_mhz", "max_freq")):
                mhz = self._number(nodes.gpu_clock / name, _MAX_HZ, unit=1_000_000)
                if mhz is not None:
                    setattr(compute, field, mhz)
        return compute if compute.ListFields() else None

    def _cpu_percent(self) -> float | None:
        line = (read_text(self._stat) or "").partition("\n")[0].split()
        # user nice system idle iowait irq softirq steal; guest time, after them, is in user already.
        times = [time for word in line[1:9] if (time := natural(word)) is not None]
        if line[:1] != ["cpu"] or len(times) < 8:
            return None
        return self._share.since_last(times[3] + times[4], sum(times))

    def _cpu_mhz(self, nodes: _Nodes) -> float | None:
        """Give the mean over the clusters that are on."""
        mhz = [
            clock
            for path in nodes.cpu_clocks
            if (clock := self._number(path, _MAX_KHZ, unit=1000)) is not None
        ]
        return round(sum(mhz) / len(mhz), 1) if mhz else None

    def _number(self, path: Path | None, high: int, unit: int) -> float | None:
        if path is None:
            return None
        number = read_number(path, 0, high)
        if number is None:
            self._nodes.missed(path)
            return None
        return number / unit


def _nodes(root: Path) -> _Nodes:
    clocks = [root / "sys/class/devfreq" / name for name in _GPU_CLOCKS]
    return _Nodes(
        cpu_clocks=tuple(sorted((root / _CPU_CLOCKS).glob("policy*/scaling_cur_freq"))),
        gpu_load=next((root / path for path in _GPU_LOADS if (root / path).exists()), None),
        gpu_clock=next((path for path in clocks if path.exists()), None),
    )
