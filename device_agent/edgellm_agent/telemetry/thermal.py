"""Reads the kernel's thermal zones with their trip points."""

from dataclasses import dataclass
from pathlib import Path

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, PartName
from edgellm_agent.telemetry.files import Discovery, Wanted, read_number, read_text

# m°C that silicon can have; a zone that is off answers with a figure far outside, or with an error.
_COLDEST, _HOTTEST = -60_000, 200_000
FILES = tuple(
    Wanted(f"sys/class/thermal/thermal_zone*/{name}")
    for name in ("type", "temp", "trip_point_*_type", "trip_point_*_temp")
)


@dataclass(frozen=True)
class Zone:
    """A zone as the kernel registered it; a trip point is None where it has none of the kind."""

    name: str
    temperature: Path
    passive_celsius: float | None
    critical_celsius: float | None


class ThermalProbe:
    """Zones below `sys/class/thermal`; one that is gated (`cv*`, an idle GPU) is left out while it is."""

    part: PartName = "thermal"

    def __init__(self, root: Path, clock: Clock) -> None:
        self._zones = Discovery(lambda: find_zones(root), clock)

    def read(self) -> telemetry_pb2.Thermal | None:
        """Give all zones that answer; None if none does."""
        thermal = telemetry_pb2.Thermal()
        for zone in self._zones.get():
            milli = read_number(zone.temperature, _COLDEST, _HOTTEST)
            if milli is None:
                self._zones.missed(zone.temperature)
                continue
            thermal.zones.add(
                name=zone.name,
                celsius=milli / 1000,
                passive_celsius=zone.passive_celsius,
                critical_celsius=zone.critical_celsius,
            )
        return summed_up(thermal)


def summed_up(thermal: telemetry_pb2.Thermal) -> telemetry_pb2.Thermal | None:
    """Give the part with its hottest zone and its margin; None if it has no zone."""
    if not thermal.zones:
        return None
    thermal.max_celsius = max(zone.celsius for zone in thermal.zones)
    margins = [
        zone.passive_celsius - zone.celsius for zone in thermal.zones if zone.HasField("passive_celsius")
    ]
    if margins:
        thermal.margin_celsius = round(min(margins), 3)
    return thermal


def find_zones(root: Path) -> list[Zone]:
    """Give the kernel's zones, whether they answer or not."""
    folders = (root / "sys/class/thermal").glob("thermal_zone*")
    return [
        Zone(name, folder / "temp", _trip(folder, "passive"), _trip(folder, "critical"))
        for folder in sorted(folders, key=lambda path: (len(path.name), path.name))
        if (name := read_text(folder / "type"))
    ]


def _trip(folder: Path, kind: str) -> float | None:
    """Give the lowest trip point of a kind, degrees Celsius: the first that the board will meet."""
    types = [path for path in folder.glob("trip_point_*_type") if read_text(path) == kind]
    points = [read_number(path.with_name(path.name[:-4] + "temp"), 1, _HOTTEST) for path in types]
    return min((milli / 1000 for milli in points if milli is not None), default=None)
