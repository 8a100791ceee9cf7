"""Reads a Jetson's power rails, over-current counters and power mode."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, PartName
from edgellm_agent.telemetry.files import Discovery, Wanted, natural, read_number, read_text

_MAX_MV, _MAX_MA, _MAX_UW = 100_000, 100_000, 1_000_000_000
# Rails that measure the input of the whole module (Orin Nano and NX, Thor).
_INPUTS = ("VDD_IN", "VIN")
_OVER_CURRENT = (("oc1", "under_voltage"), ("oc2", "average"), ("oc3", "instantaneous"))
_MONITORS = "sys/bus/i2c/devices"
_HWMON = "sys/class/hwmon"
FILES = (
    *(
        Wanted(f"{_MONITORS}/*/hwmon/hwmon*/{name}")
        for name in (
            "name",
            "label",
            "in[1-3]_label",
            "in[1-3]_input",
            "in[1-3]_enable",
            "curr[1-3]_input",
            "power1_input",
        )
    ),
    Wanted(f"{_HWMON}/hwmon*/name"),
    Wanted(f"{_HWMON}/hwmon*/oc[1-3]_event_cnt"),
    Wanted("var/lib/nvpmodel/status"),
    Wanted("etc/nvpmodel.conf", lines=r"<\s*POWER_MODEL\s"),
)
_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=([0-9]{1,4})\s+NAME=([^\s>]+)\s*>")


@dataclass(frozen=True)
class _Rail:
    name: str
    voltage: Path
    current: Path
    # Only where the monitor multiplies by itself; it is then the more exact figure.
    power: Path | None = None

    def read(self) -> telemetry_pb2.PowerRail | None:
        """Give the rail's figures; None where its power cannot be told."""
        mv = read_number(self.voltage, 0, _MAX_MV)
        # A shunt without load reads a little below zero.
        ma = read_number(self.current, -_MAX_MA, _MAX_MA)
        if self.power is not None:
            uw = read_number(self.power, 0, _MAX_UW)
            power_mw = None if uw is None else uw / 1000
        else:
            power_mw = None if mv is None or ma is None else mv * ma / 1000
        if power_mw is None:
            return None
        return telemetry_pb2.PowerRail(name=self.name, voltage_mv=mv, current_ma=ma, power_mw=power_mw)


class PowerProbe:
    """INA3221 and INA238 monitors on I²C, the `soctherm_oc` counters and nvpmodel's mode."""

    part: PartName = "power"

    def __init__(self, root: Path, clock: Clock) -> None:
        self._rails = Discovery(lambda: list(_rails(root)), clock)
        self._counters = OverCurrentCounters(root, clock)
        self._mode = _PowerMode(root)

    def read(self) -> telemetry_pb2.Power | None:
        """Give what answers; None if nothing does."""
        power = telemetry_pb2.Power(mode=self._mode.read())
        known = self._rails.get()
        for rail in known:
            if (figures := rail.read()) is None:
                self._rails.missed(rail.current)
            else:
                power.rails.append(figures)
        read = {rail.name: rail.power_mw for rail in power.rails}
        total_mw = _total_mw({rail.name for rail in known}, read)
        if total_mw is not None:
            power.total_mw = total_mw
        power.over_current.extend(self._counters.read())
        return power if power.rails or power.over_current or power.mode else None


class OverCurrentCounters:
    """The `soctherm_oc` counters."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self._counters = Discovery(lambda: list(_counters(root)), clock)

    def read(self) -> list[telemetry_pb2.OverCurrent]:
        """Give the counters that answer."""
        counted = []
        for kind, path in self._counters.get():
            if (events := read_number(path, 0, 2**48)) is None:
                self._counters.missed(path)
            else:
                counted.append(telemetry_pb2.OverCurrent(kind=kind, events=events))
        return counted


def _total_mw(known: set[str], read: dict[str, float]) -> float | None:
    """Give the module's input, milliwatts; None where a rail that it needs did not answer.

    AGX Orin measures its input on no single rail (VIN_SYS_5V0 feeds only input and output), so there the
    rails add up, as in jetson-stats.
    """
    for name in _INPUTS:
        if name in known:
            return read.get(name)
    return sum(read.values()) if known and known == read.keys() else None


def _rails(root: Path) -> Iterator[_Rail]:
    for folder in sorted((root / _MONITORS).glob("*/hwmon/hwmon*")):
        chip = read_text(folder / "name")
        if chip == "ina238":
            # in0 is the shunt, in1 the bus. Boards that do not label it have it at their input.
            name = read_text(folder / "label") or "VIN"
            yield _Rail(name, folder / "in1_input", folder / "curr1_input", folder / "power1_input")
        elif chip == "ina3221":
            # Channels 4 to 6 are shunt voltages and 7 their sum.
            for channel in (1, 2, 3):
                label = read_text(folder / f"in{channel}_label")
                # A channel that is switched off answers nothing for good; it is no rail that fails to answer.
                off = read_number(folder / f"in{channel}_enable", 0, 1) == 0
                if label and label != "NC" and not off:
                    yield _Rail(label, folder / f"in{channel}_input", folder / f"curr{channel}_input")


def _counters(root: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted((root / _HWMON).glob("hwmon*")):
        if read_text(folder / "name") == "soctherm_oc":
            for name, kind in _OVER_CURRENT:
                path = folder / f"{name}_event_cnt"
                if path.exists():
                    yield kind, path


def power_modes(conf: str) -> dict[int, str]:
    """Names by number, from the text of nvpmodel.conf."""
    return {int(match[1]): match[2] for match in _MODE.finditer(conf)}


class _PowerMode:
    """nvpmodel's mode by name, since the same number means another mode on another board."""

    def __init__(self, root: Path) -> None:
        self._status = root / "var/lib/nvpmodel/status"
        self._conf = root / "etc/nvpmodel.conf"
        self._conf_mtime_ns = 0
        self._names: dict[int, str] = {}

    def read(self) -> str:
        """Give the name, empty if unknown."""
        status = read_text(self._status) or ""
        number = natural(status.removeprefix("pmode:").split(" ", 1)[0])
        if number is None or not status.startswith("pmode:"):
            return ""
        try:
            mtime_ns = self._conf.stat().st_mtime_ns
        except OSError:
            return ""
        if mtime_ns != self._conf_mtime_ns:
            self._names = power_modes(read_text(self._conf, limit=1 << 20) or "")
            self._conf_mtime_ns = mtime_ns
        return self._names.get(number, "")
