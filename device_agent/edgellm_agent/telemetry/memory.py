"""Reads how much memory is left and how hard tasks wait for it."""

import re
from pathlib import Path

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import PartName
from edgellm_agent.telemetry.files import Wanted, natural, read_text

_MEMINFO = re.compile(r"^(MemTotal|MemAvailable):\s+([0-9]{1,15}) kB$", re.MULTILINE)
_PRESSURE_FILE = "proc/pressure/memory"
FILES = (
    Wanted("proc/meminfo", lines="Mem(Total|Available):"),
    Wanted("proc/swaps"),
    Wanted(_PRESSURE_FILE, lines="some "),
)
_PRESSURE = re.compile(r"^some avg10=([0-9]{1,3}\.[0-9]{2}) ")


class MemoryProbe:
    """`/proc/meminfo`, `/proc/swaps` and `/proc/pressure/memory`."""

    part: PartName = "memory"

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self) -> telemetry_pb2.Memory | None:
        """Give memory and swap, bytes; None where the kernel does not tell what is available."""
        meminfo = read_text(self._root / "proc/meminfo") or ""
        kib = {name: int(value) for name, value in _MEMINFO.findall(meminfo)}
        total, available = kib.get("MemTotal", 0), kib.get("MemAvailable")
        if not total or available is None or available > total:
            return None
        swap = _swap_kib(read_text(self._root / "proc/swaps"))
        return telemetry_pb2.Memory(
            total_bytes=total * 1024,
            available_bytes=available * 1024,
            swap_total_bytes=None if swap is None else swap[0] * 1024,
            swap_used_bytes=None if swap is None else swap[1] * 1024,
            pressure_some_percent=pressure_some_percent(self._root),
        )


def pressure_some_percent(root: Path) -> float | None:
    """Give the share of the last 10 s in which some task waited for memory, 0 to 100; None without PSI."""
    match = _PRESSURE.match(read_text(root / _PRESSURE_FILE) or "")
    return float(match[1]) if match and float(match[1]) <= 100 else None


def _swap_kib(table: str | None) -> tuple[int, int] | None:
    """Give size and use of all swap areas; None where the table does not read as one."""
    rows = (table or "").splitlines()
    if not rows or not rows[0].startswith("Filename"):
        return None
    size = used = 0
    for row in rows[1:]:
        words = row.split()
        figures = [natural(word) for word in words[2:4]]
        if len(figures) < 2 or figures[0] is None or figures[1] is None:
            return None
        size, used = size + figures[0], used + figures[1]
    return size, used
