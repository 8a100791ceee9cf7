"""Picks the source for the machine that the agent runs on."""

from pathlib import Path

from edgellm_agent.telemetry.base import Clock, Source
from edgellm_agent.telemetry.host import HostSource
from edgellm_agent.telemetry.sysfs import SysfsSource, is_tegra


def detect_source(root: Path = Path("/"), clock: Clock | None = None) -> Source:
    """Give the kernel's files on a Tegra board, else the host."""
    return SysfsSource(root, clock) if is_tegra(root) else HostSource(root)
