"""Reads the store: what each device is now, and what was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from edgellm.errors import EdgellmError
from edgellm.fleet.store import KIND_NAMES, Reject, open_database
from edgellm.fleet.topics import EVENTS, DeviceTopics
from edgellm.v1 import fleet_pb2, telemetry_pb2

if TYPE_CHECKING:
    from typing_extensions import Self

# What a device is silent for before it is in trouble, though its state says "online".
SILENT_S = 120.0
# Clocks that differ by less are taken for equal: messages need time to travel.
_SKEW_S = 2.0
_GOVERNOR_RANK = {"CRITICAL": 0, "HOT": 1, "WARM": 3}
_FAILED_PHASES = {"FAILED", "REFUSED", "RETRYING"}


@dataclass(frozen=True)
class DeviceView:
    """The newest of each part that a device has told; a part that it never told is empty."""

    topics: DeviceTopics
    # Clock of this machine, nanoseconds since 1970: when the device was first known of, and last heard; 0 for
    # never heard, only known from what the broker had kept.
    first_seen_ns: int
    last_seen_ns: int
    # How far the device's clock is behind (positive) or ahead; None if nothing told it.
    skew_s: float | None
    # None if it never told its state.
    state: fleet_pb2.DeviceState | None
    reported: fleet_pb2.Reported | None
    desired: fleet_pb2.Desired | None
    # The parts of all telemetry topics, merged.
    telemetry: telemetry_pb2.Telemetry
    # When the newest telemetry came; 0 if none did.
    telemetry_ns: int
    last_event: fleet_pb2.Event | None
    last_event_ns: int
    # Since when somebody listens: before, nobody could have heard it.
    listening_since_ns: int = 0

    @property
    def online(self) -> bool:
        """Whether its session stands, as far as the broker knows."""
        return self.state is not None and self.state.online

    @property
    def clock_skew_s(self) -> float | None:
        """The skew, if it is more than a message's journey."""
        return self.skew_s if self.skew_s is not None and abs(self.skew_s) >= _SKEW_S else None

    @property
    def converging(self) -> bool:
        """Whether it is not yet where the fleet wants it."""
        wanted = self.desired.generation if self.desired is not None else 0
        observed = self.reported.observed_generation if self.reported is not None else 0
        phase = self.reported.phase if self.reported is not None else "NONE"
        return wanted > observed or phase not in {"", "NONE", "CONVERGED"}

    def silent(self, now_ns: int) -> bool:
        """Whether it says that it is online, and nothing else."""
        heard_ns = max(self.first_seen_ns, self.last_seen_ns, self.listening_since_ns)
        return self.online and now_ns - heard_ns > SILENT_S * 1e9

    def rank(self, now_ns: int) -> tuple[int, str, str]:
        """Sorts the worst first: critical, hot, failed, gone, warm, on the way, and then by name."""
        phase = self.reported.phase if self.reported is not None else ""
        ranks = [_GOVERNOR_RANK.get(self.telemetry.governor.state, 6)] if self.online else []
        ranks.append(2 if phase in _FAILED_PHASES else 6)
        ranks.append(6 if self.online and not self.silent(now_ns) else 2)
        ranks.append(4 if self.converging else 6)
        return min(ranks), self.topics.group, self.topics.device


@dataclass(frozen=True)
class HourSummary:
    """Least, mean and greatest of a figure in one hour of the device's clock; None where there is none."""

    hour_ns: int
    records: int
    celsius: tuple[float, float, float] | None
    power_mw: tuple[float, float, float] | None
    tokens_per_s: tuple[float, float, float] | None
    tokens_per_joule: float | None


class FleetReader:
    """Reads one store; belongs to the thread that made it."""

    def __init__(self, path: Path) -> None:
        """Raises EdgellmError for a file that is not there or cannot be used."""
        self._database = open_database(path, create=False)

    def __enter__(self) -> Self:
        """For `with`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._database.close()

    def devices(self, listening_since_ns: int = 0) -> list[DeviceView]:
        """All known devices, by source."""
        parts: dict[int, dict[str, tuple[int, fleet_pb2.Event]]] = {}
        with self._snapshot():
            for device, part, received_ns, data in self._database.execute(
                "SELECT device, part, received_ns, event FROM latest"
            ):
                parts.setdefault(device, {})[part] = received_ns, fleet_pb2.Event.FromString(data)
            rows = self._database.execute(
                "SELECT id, tenant, grp, name, first_seen_ns, last_seen_ns, skew_ns FROM devices"
                " ORDER BY source"
            ).fetchall()
        views = [_view(DeviceTopics(*row[1:4]), row[4:7], parts.get(row[0], {})) for row in rows]
        return [replace(view, listening_since_ns=listening_since_ns) for view in views]

    def find(self, name: str) -> DeviceView:
        """The device of that name, or of GROUP/NAME if several have it; raises EdgellmError."""
        views = self.devices()
        found = [
            item
            for item in views
            if name in {item.topics.device, f"{item.topics.group}/{item.topics.device}"}
        ]
        if len(found) == 1:
            return found[0]
        if found:
            which = ", ".join(f"{item.topics.group}/{item.topics.device}" for item in found)
            raise EdgellmError(f"several devices are called {name}: {which}", "name it as GROUP/DEVICE")
        known = ", ".join(item.topics.device for item in views[:10]) or "none"
        raise EdgellmError(
            f"no device {name!r:.80} was recorded; known: {known}", "see `edgellm fleet status`"
        )

    def counters(self) -> dict[str, int]:
        """What came, by what became of it."""
        return dict(self._database.execute("SELECT name, value FROM counters ORDER BY name"))

    def sizes(self) -> tuple[int, int, int]:
        """Telemetry messages, events, and the bytes of the file."""
        counts = [
            int(self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608
            for table in ("telemetry", "events")
        ]
        pages, size = (
            int(self._database.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "page_size")
        )
        return counts[0], counts[1], pages * size

    def rejects(self, limit: int) -> list[Reject]:
        """The messages that were not taken, the newest first."""
        rows = self._database.execute(
            "SELECT received_ns, topic, reason, detail, payload FROM rejects ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [Reject(*row) for row in rows]

    def newest_ns(self) -> int:
        """When anything was heard last; 0 if nothing was."""
        (newest,) = self._database.execute("SELECT coalesce(max(last_seen_ns), 0) FROM devices").fetchone()
        return int(newest)

    def events(self, topics: DeviceTopics, since_ns: int, limit: int) -> list[tuple[int, fleet_pb2.Event]]:
        """The newest events that came since, each with its time of arrival; the oldest of them first."""
        rows = self._database.execute(
            "SELECT received_ns, event FROM events WHERE device = (SELECT id FROM devices WHERE source = ?)"
            " AND received_ns >= ? ORDER BY run DESC, time_ns DESC, sequence DESC LIMIT ?",
            (topics.source, since_ns, limit),
        )
        return [(received_ns, fleet_pb2.Event.FromString(data)) for received_ns, data in rows][::-1]

    def missing_events(self, topics: DeviceTopics) -> int:
        """Events that were told, by the numbers of those before and after them, and never came."""
        (missing,) = self._database.execute(
            "SELECT coalesce(sum(gap), 0) FROM (SELECT max(sequence) - min(sequence) + 1 - count(*) AS gap"
            " FROM events WHERE device = (SELECT id FROM devices WHERE source = ?) GROUP BY run, kind)",
            (topics.source,),
        ).fetchone()
        return int(missing)

    def telemetry(
        self, topics: DeviceTopics, since_ns: int
    ) -> Iterator[tuple[int, int, int, str, telemetry_pb2.Telemetry]]:
        """What came since: (received, run, sequence, name of the topic, record), in the order of taking."""
        rows = self._database.execute(
            "SELECT received_ns, run, sequence, kind, record FROM telemetry"
            " WHERE device = (SELECT id FROM devices WHERE source = ?) AND received_ns >= ?"
            " ORDER BY run, sequence, kind",
            (topics.source, since_ns),
        )
        for received_ns, run, sequence, kind, data in rows:
            name = KIND_NAMES[kind]
            yield received_ns, run, sequence, name, telemetry_pb2.Telemetry.FromString(data)

    def hours(self, topics: DeviceTopics, since_ns: int) -> list[HourSummary]:
        """The telemetry that came since, one line for each hour of the device's clock."""
        hours: dict[int, _Hour] = {}
        for received_ns, _run, _sequence, _name, record in self.telemetry(topics, since_ns):
            taken_ns = record.time.ToNanoseconds() if record.HasField("time") else received_ns
            hours.setdefault(taken_ns // _HOUR_NS, _Hour()).add(record)
        return [hour.summary(number * _HOUR_NS) for number, hour in sorted(hours.items())]

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        # Several statements see one state of the file.
        self._database.execute("BEGIN")
        try:
            yield
        finally:
            self._database.execute("COMMIT")


_HOUR_NS = 3600 * 10**9


class _Hour:
    """Collects the figures of one hour."""

    def __init__(self) -> None:
        self._sequences: set[int] = set()
        self._celsius: list[float] = []
        self._power_mw: list[float] = []
        self._tokens_per_s: list[float] = []
        self._tokens_per_joule: list[float] = []

    def add(self, record: telemetry_pb2.Telemetry) -> None:
        self._sequences.add(record.sequence)
        if record.thermal.HasField("max_celsius"):
            self._celsius.append(record.thermal.max_celsius)
        if record.power.HasField("total_mw"):
            self._power_mw.append(record.power.total_mw)
        if record.HasField("runtime"):
            self._tokens_per_s.append(record.runtime.decode_tokens_per_s)
            if record.runtime.HasField("tokens_per_joule"):
                self._tokens_per_joule.append(record.runtime.tokens_per_joule)

    def summary(self, hour_ns: int) -> HourSummary:
        efficiency = _spread(self._tokens_per_joule)
        return HourSummary(
            hour_ns,
            len(self._sequences),
            _spread(self._celsius),
            _spread(self._power_mw),
            _spread(self._tokens_per_s),
            efficiency[1] if efficiency else None,
        )


def _spread(values: list[float]) -> tuple[float, float, float] | None:
    return (min(values), sum(values) / len(values), max(values)) if values else None


def _view(
    topics: DeviceTopics, seen: tuple[int, int, int | None], parts: dict[str, tuple[int, fleet_pb2.Event]]
) -> DeviceView:
    first_seen_ns, last_seen_ns, skew_ns = seen

    def of(part: str) -> fleet_pb2.Event | None:
        return parts[part][1] if part in parts else None

    telemetry, telemetry_ns = telemetry_pb2.Telemetry(), 0
    for name in KIND_NAMES.values():
        if name in parts:
            received_ns, event = parts[name]
            telemetry.MergeFrom(event.telemetry)
            telemetry_ns = max(telemetry_ns, received_ns)
    told = [parts[kind] for kind in EVENTS if kind in parts]
    last_ns, last = max(told, key=lambda item: (item[1].run, item[1].time.ToNanoseconds()), default=(0, None))
    state, reported, desired = of("state"), of("reported"), of("desired")
    return DeviceView(
        topics=topics,
        first_seen_ns=first_seen_ns,
        last_seen_ns=last_seen_ns,
        skew_s=None if skew_ns is None else skew_ns / 1e9,
        state=state.state if state is not None else None,
        reported=reported.reported if reported is not None else None,
        desired=desired.desired if desired is not None else None,
        telemetry=telemetry,
        telemetry_ns=telemetry_ns,
        last_event=last,
        last_event_ns=last_ns,
    )
