"""Reads the kernel's thermal zones with their trip points."""

from dataclasses import dataclass
from pathlib import Path

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, PartName
from edgellm_agent.telemetry.files import Discovery, read_number, read_text

# m°C that silicon can have; a zone that is off answers with a figure far outside, or with an error.
_COLDEST, _HOTTEST = -60_000, 200_000


@dataclass(frozen=True)
class _Zone:
    name: str
    temperature: Path
    passive_celsius: float | None
    critical_celsius: float | None


class ThermalProbe:
    """Zones below `sys/class/thermal`; one that is gated (`cv*`, an idle GPU) is left out while it is."""

    part: PartName = "thermal"

    def __init__(self, root: Path, clock: Clock) -> None:
        self._zones = Discovery(lambda: _zones(root), clock)

    def read(self) -> telemetry_pb2.Thermal | None:
        """Give all zones that answer; None if none does."""
        thermal = telemetry_pb2.Thermal()
        margins = []
        for zone in self._zones.get():
            milli = read_number(zone.temperature, _COLDEST, _HOTTEST)
            if milli is None:
                self._zones.missed(zone.temperature)
                continue
            celsius = milli / 1000
            thermal.zones.add(
                name=zone.name,
                celsius=celsius,
                passive_celsius=zone.passive_celsius,
                critical_celsius=zone.critical_celsius,
            )
            if zone.passive_celsius is not None:
                margins.append(zone.passive_celsius - celsius)
        if not thermal.zones:
            return None
        thermal.max_celsius = max(zone.celsius for zone in thermal.zones)
        if margins:
            thermal.margin_celsius = round(min(margins), 3)
        return thermal


def _zones(root: Path) -> list[_Zone]:
    folders = (root / "sys/class/thermal").glob("thermal_zone*")
    return [
        _Zone(name, folder / "temp", _trip(folder, "passive"), _trip(folder, "critical"))
        for folder in sorted(folders, key=lambda path: (len(path.name), path.name))
        if (name := read_text(folder / "type"))
    ]


def _trip(folder: Path, kind: str) -> float | None:
    """Give the lowest trip point of a kind, degrees Celsius: the first that the board will meet."""
    types = [path for path in folder.glob("trip_point_*_type") if read_text(path) == kind]
    points = [read_number(path.with_name(path.name[:-4] + "temp"), 1, _HOTTEST) for path in types]
    return min((milli / 1000 for milli in points if milli is not None), default=None)
