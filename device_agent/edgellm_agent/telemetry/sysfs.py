"""The source on a Jetson: the kernel's own files, without a service or a licence question."""

import re
from pathlib import Path

from edgellm_agent.telemetry import compute, memory, power, thermal
from edgellm_agent.telemetry.base import Clock, Probe
from edgellm_agent.telemetry.compute import ComputeProbe
from edgellm_agent.telemetry.files import Wanted, read_text
from edgellm_agent.telemetry.memory import MemoryProbe
from edgellm_agent.telemetry.power import PowerProbe
from edgellm_agent.telemetry.thermal import ThermalProbe

_COMPATIBLE = "proc/device-tree/compatible"
_L4T_RELEASE = "etc/nv_tegra_release"
# All that is read below the root, to find out what the board is and what it does.
FILES = (
    Wanted(_COMPATIBLE),
    Wanted(_L4T_RELEASE, lines="#"),
    *thermal.FILES,
    *power.FILES,
    *compute.FILES,
    *memory.FILES,
)
_L4T = re.compile(r"# R([0-9]+) \(release\), REVISION: ([0-9.]+)")


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

    def close(self) -> None:
        """Nothing is held open."""


def is_tegra(root: Path) -> bool:
    """Tell whether the root looks like a Tegra board."""
    compatible = read_text(root / _COMPATIBLE) or ""
    return "nvidia,tegra" in compatible or (root / _L4T_RELEASE).exists()


def board_name(root: Path) -> str:
    """Give the first, most special name in the device tree's compatible string; empty if there is none."""
    return (read_text(root / _COMPATIBLE) or "").partition("\0")[0]


def l4t_release(root: Path) -> str:
    """Give the release of Jetson Linux, for example "R36.4.3"; empty if there is none."""
    match = _L4T.match(read_text(root / _L4T_RELEASE) or "")
    return f"R{match[1]}.{match[2]}" if match else ""
