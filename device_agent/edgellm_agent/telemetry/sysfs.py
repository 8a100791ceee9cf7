"""The source on a Jetson: the kernel's own files, without a service or a licence question."""

from pathlib import Path

from edgellm_agent.telemetry.base import Clock, Probe
from edgellm_agent.telemetry.compute import ComputeProbe
from edgellm_agent.telemetry.files import read_text
from edgellm_agent.telemetry.memory import MemoryProbe
from edgellm_agent.telemetry.power import PowerProbe
from edgellm_agent.telemetry.thermal import ThermalProbe


class SysfsSource:
    """Thermal zones, power rails, processors and memory below a root directory."""

    name = "sysfs"

    def __init__(self, root: Path = Path("/"), clock: Clock | None = None) -> None:
        clock = clock or Clock()
        self.probes: tuple[Probe, ...] = (
            ThermalProbe(root, clock),
            PowerProbe(root, clock),
            ComputeProbe(root, clock),
            MemoryProbe(root),
        )


def is_tegra(root: Path) -> bool:
    """Tell whether the root looks like a Tegra board."""
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    return "nvidia,tegra" in compatible or (root / "etc/nv_tegra_release").exists()
