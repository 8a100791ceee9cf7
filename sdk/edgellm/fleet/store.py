"""What the fleet told, in one SQLite file that several receivers and readers share."""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm import paths
from edgellm.errors import EdgellmError
from edgellm.fleet.topics import TELEMETRY
from edgellm.fleet.validate import Incoming
from edgellm.sqlite import transaction
from edgellm.v1 import fleet_pb2

SCHEMA_VERSION = 1
# In the file's header, so that no other database is taken for ours: "ELfl".
_APPLICATION_ID = 0x454C666C
_KINDS = {name: number for number, name in enumerate(TELEMETRY, start=1)}
KIND_NAMES = {number: name for name, number in _KINDS.items()}
_LAST_OF_SESSION = 2**63 - 1
_DAY_NS = 86_400 * 10**9
# A clock's skew is the least delay seen for this long: what waited somewhere came later, never sooner.
_SKEW_WINDOW_NS = 600 * 10**9
_REJECTS_KEPT = 1000
_REJECT_BYTES = 512
# Rows that one transaction of `prune` takes away: other receivers must not wait long for it.
_PRUNE_ROWS = 5000
_BUSY_S = 30.0

_SCHEMA = """
CREATE TABLE store (id TEXT NOT NULL);
CREATE TABLE devices (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL, grp TEXT NOT NULL, name TEXT NOT NULL,
    first_seen_ns INTEGER NOT NULL, last_seen_ns INTEGER NOT NULL, skew_ns INTEGER, skew_at_ns INTEGER);
-- The newest event of each part of a device, newest by (high, low) and not by arrival.
CREATE TABLE latest (
    device INTEGER NOT NULL, part TEXT NOT NULL, high INTEGER NOT NULL, low INTEGER NOT NULL,
    received_ns INTEGER NOT NULL, event BLOB NOT NULL, PRIMARY KEY (device, part)) WITHOUT ROWID;
CREATE TABLE telemetry (
    id INTEGER PRIMARY KEY, device INTEGER NOT NULL, run INTEGER NOT NULL, sequence INTEGER NOT NULL,
    kind INTEGER NOT NULL, time_ns INTEGER, received_ns INTEGER NOT NULL, record BLOB NOT NULL);
-- The parts of one record lie side by side in the index, so a record touches one page of it.
CREATE UNIQUE INDEX telemetry_once ON telemetry (device, run, sequence, kind);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, device INTEGER NOT NULL, event_id TEXT NOT NULL, kind TEXT NOT NULL,
    run INTEGER NOT NULL, sequence INTEGER NOT NULL, time_ns INTEGER, received_ns INTEGER NOT NULL,
    event BLOB NOT NULL);
CREATE UNIQUE INDEX events_once ON events (device, event_id);
CREATE TABLE rejects (
    id INTEGER PRIMARY KEY, received_ns INTEGER NOT NULL, topic TEXT NOT NULL, reason TEXT NOT NULL,
    detail TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Reject:
    """A message that was not taken."""

    received_ns: int
    topic: str
    reason: str
    detail: str
    payload: bytes


@dataclass(frozen=True)
class Retention:
    """What is kept: telemetry by age and by bytes of the whole file, events by age."""

    telemetry_days: float = 7.0
    event_days: float = 365.0
    max_bytes: int = 2 * 10**9


def default_path() -> Path:
    """Where the fleet is recorded if nobody says otherwise."""
    return paths.data_dir() / "fleet.db"


def open_database(path: Path, *, create: bool) -> sqlite3.Connection:
    """Opens the file, with the schema made or checked; raises EdgellmError.

    Without `create` a file that is not there is an error.
    """
    if not create and not path.exists():
        raise EdgellmError(f"nothing was recorded yet: {path} is not there", "run `edgellm fleet watch`")
    database: sqlite3.Connection | None = None
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        _prepare(database, path)
    except (sqlite3.Error, OSError, EdgellmError) as error:
        if database is not None:
            database.close()
        if isinstance(error, EdgellmError):
            raise
        raise EdgellmError(f"{path} cannot be used: {error}", "name another file with --db") from None
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    # What is acknowledged to the broker must outlive a power cut.
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA cache_size = -16000")
    # Hot pages of many devices are written to the file once in 16 MB of log, not in 4.
    database.execute("PRAGMA wal_autocheckpoint = 4000")
    with transaction(database):
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (application,) = database.execute("PRAGMA application_id").fetchone()
        tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 0 and application == 0 and tables == 0:
            for statement in _SCHEMA.split(";\n"):
                database.execute(statement)
            database.execute("INSERT INTO store VALUES (?)", (uuid.uuid4().hex[:12],))
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif application != _APPLICATION_ID:
            raise EdgellmError(f"{path} is another program's database", "name another file with --db")
        elif version != SCHEMA_VERSION:
            raise EdgellmError(
                f"{path} has schema {version}, this version reads {SCHEMA_VERSION}",
                "use the version of edgellm that wrote it, or name another file with --db",
            )


class Store:
    """Writes what came; belongs to the thread that made it.

    Args:
        path: The database file; made with its folders if it is not there.
        retention: What `prune` leaves.
    """

    def __init__(self, path: Path, retention: Retention | None = None) -> None:
        """Raises EdgellmError for a file that cannot be used."""
        self._database = open_database(path, create=True)
        self._retention = retention or Retention()
        self._devices: dict[str, int] = {}

    @property
    def id(self) -> str:
        """Names the file's content: receivers that share it share the load."""
        (name,) = self._database.execute("SELECT id FROM store").fetchone()
        return str(name)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def record(self, messages: Sequence[Incoming], rejects: Sequence[Reject] = ()) -> list[Incoming]:
        """Commits a batch, whole or not at all; gives the messages that told something new, in their order.

        Raises sqlite3.Error, after which nothing of the batch is in the file.
        """
        counts: Counter[str] = Counter()
        fresh = []
        rejects = list(rejects)
        with transaction(self._database):
            # Another process may have forgotten a device meanwhile; in a transaction nobody can.
            self._devices.clear()
            for message in messages:
                outcome = self._take(message, rejects)
                counts[outcome] += 1
                if outcome == "recorded":
                    fresh.append(message)
            self._touch(messages)
            for reject in rejects:
                counts["rejected"] += 1
                counts[f"rejected: {reject.reason}"] += 1
            self._keep_rejects(rejects)
            self._count(counts)
        return fresh

    def forget(self, source: str) -> None:
        """Removes a device and all that it told."""
        with transaction(self._database):
            row = self._database.execute("SELECT id FROM devices WHERE source = ?", (source,)).fetchone()
            if row is not None:
                for table in ("latest", "telemetry", "events"):
                    self._database.execute(f"DELETE FROM {table} WHERE device = ?", row)  # noqa: S608
                self._database.execute("DELETE FROM devices WHERE id = ?", row)

    def prune(self, now_ns: int | None = None) -> bool:
        """Drops some of what is past its retention, oldest first; gives whether there is more."""
        now_ns = time.time_ns() if now_ns is None else now_ns
        limits = self._retention
        with transaction(self._database):
            oldest = [
                self._drop(table, _PRUNE_ROWS, now_ns - round(days * _DAY_NS))
                for table, days in (("telemetry", limits.telemetry_days), ("events", limits.event_days))
            ]
            if _PRUNE_ROWS in oldest:
                return True
            if self.used_bytes <= limits.max_bytes:
                return False
            (span,) = self._database.execute(
                "SELECT coalesce(max(id) - min(id), 0) FROM telemetry"
            ).fetchone()
            # A tenth at a time, so that a small file does not lose all at once.
            dropped = self._drop("telemetry", min(_PRUNE_ROWS, span // 10 + 1), None)
            return bool(dropped) and self.used_bytes > limits.max_bytes

    def _drop(self, table: str, rows: int, before_ns: int | None) -> int:
        """Deletes up to so many of the oldest rows; gives how many there were."""
        # Row ids grow with arrival, so the oldest are found without an index on time.
        return self._database.execute(
            f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} ORDER BY id LIMIT ?1)"  # noqa: S608
            " AND (?2 IS NULL OR received_ns < ?2)",
            (rows, before_ns),
        ).rowcount

    @property
    def used_bytes(self) -> int:
        """Bytes of the file that hold something; freed pages are used again."""
        size, pages, free = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        return int(size * (pages - free))

    def _take(self, message: Incoming, rejects: list[Reject]) -> str:
        """Stores one message; gives the name of the counter that it counts for."""
        device = self._device(message)
        event = message.event
        if event is None:
            self._database.execute("DELETE FROM latest WHERE device = ? AND part = ?", (device, message.part))
            return "cleared"
        if message.part in TELEMETRY:
            if not self._add_telemetry(device, message, event):
                return "duplicates"
            self._renew(device, message, event, (event.run, event.sequence))
            return "recorded"
        if message.part in {"state", "reported", "desired"}:
            return "recorded" if self._renew(device, message, event, _order(message, event)) else "duplicates"
        return self._take_event(device, message, event, rejects)

    def _add_telemetry(self, device: int, message: Incoming, event: fleet_pb2.Event) -> bool:
        row = (
            device, event.run, event.sequence, _KINDS[message.part], message.time_ns, message.received_ns,
            event.telemetry.SerializeToString(),
        )  # fmt: skip
        cursor = self._database.execute(
            "INSERT OR IGNORE INTO telemetry (device, run, sequence, kind, time_ns, received_ns, record)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        return cursor.rowcount == 1

    def _take_event(
        self, device: int, message: Incoming, event: fleet_pb2.Event, rejects: list[Reject]
    ) -> str:
        data = event.SerializeToString(deterministic=True)
        cursor = self._database.execute(
            "INSERT OR IGNORE INTO events (device, event_id, kind, run, sequence, time_ns, received_ns,"
            " event) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                device,
                event.id,
                message.part,
                event.run,
                event.sequence,
                message.time_ns,
                message.received_ns,
                data,
            ),
        )
        if cursor.rowcount == 1:
            self._renew(device, message, event, (event.run, event.sequence))
            return "recorded"
        (known,) = self._database.execute(
            "SELECT event FROM events WHERE device = ? AND event_id = ?", (device, event.id)
        ).fetchone()
        if known == data:
            return "duplicates"
        # Two events under one id: a device that lost its counters, as one that was installed anew.
        detail = f"{event.id} of {message.topics.source}; `edgellm fleet forget` lets it start afresh"
        rejects.append(
            Reject(message.received_ns, message.topics.event(message.part), "id used before", detail, data)
        )
        return "conflicts"

    def _renew(self, device: int, message: Incoming, event: fleet_pb2.Event, order: tuple[int, int]) -> bool:
        """Makes the event its part's newest, unless a newer one is known."""
        cursor = self._database.execute(
            "INSERT INTO latest (device, part, high, low, received_ns, event) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET high = excluded.high, low = excluded.low,"
            " received_ns = excluded.received_ns, event = excluded.event"
            " WHERE (excluded.high, excluded.low) > (high, low) AND excluded.event != event",
            (device, message.part, *order, message.received_ns, event.SerializeToString(deterministic=True)),
        )
        return cursor.rowcount == 1

    def _device(self, message: Incoming) -> int:
        topics = message.topics
        known = self._devices.get(topics.source)
        if known is None:
            self._database.execute(
                "INSERT OR IGNORE INTO devices (source, tenant, grp, name, first_seen_ns, last_seen_ns)"
                " VALUES (?, ?, ?, ?, ?, 0)",
                (topics.source, topics.tenant, topics.group, topics.device, message.received_ns),
            )
            (known,) = self._database.execute(
                "SELECT id FROM devices WHERE source = ?", (topics.source,)
            ).fetchone()
            self._devices[topics.source] = int(known)
        return int(known)

    def _touch(self, messages: Iterable[Incoming]) -> None:
        """Notes when each device was heard, and how far its clock is off."""
        heard: dict[int, int] = {}
        skews: dict[int, tuple[int, int]] = {}
        for message in messages:
            if not _is_sign_of_life(message):
                continue
            device = self._device(message)
            heard[device] = max(heard.get(device, 0), message.received_ns)
            if message.time_ns is not None:
                delay = message.received_ns - message.time_ns
                skews[device] = min(skews.get(device, (delay, 0)), (delay, message.received_ns))
        self._database.executemany(
            "UPDATE devices SET last_seen_ns = max(last_seen_ns, ?) WHERE id = ?",
            [(at, device) for device, at in heard.items()],
        )
        self._database.executemany(
            "UPDATE devices SET skew_ns = ?1, skew_at_ns = ?2 WHERE id = ?3"
            " AND (skew_ns IS NULL OR ?1 <= skew_ns OR ?2 > skew_at_ns + ?4)",
            [(skew, at or heard[device], device, _SKEW_WINDOW_NS) for device, (skew, at) in skews.items()],
        )

    def _keep_rejects(self, rejects: Sequence[Reject]) -> None:
        if not rejects:
            return
        self._database.executemany(
            "INSERT INTO rejects (received_ns, topic, reason, detail, payload) VALUES (?, ?, ?, ?, ?)",
            [
                (
                    item.received_ns,
                    item.topic[:200],
                    item.reason,
                    item.detail[:300],
                    item.payload[:_REJECT_BYTES],
                )
                for item in rejects[-_REJECTS_KEPT:]
            ],
        )
        self._database.execute(
            "DELETE FROM rejects WHERE id <= (SELECT max(id) FROM rejects) - ?", (_REJECTS_KEPT,)
        )

    def _count(self, counts: Counter[str]) -> None:
        self._database.executemany(
            "INSERT INTO counters VALUES (?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
            list(counts.items()),
        )


def _order(message: Incoming, event: fleet_pb2.Event) -> tuple[int, int]:
    """What makes one state, reported or desired newer than another."""
    if message.part == "desired":
        # Of two with one generation the broker keeps the last, and so do we.
        return event.desired.generation, message.received_ns
    if message.part == "reported":
        return event.run, event.sequence
    # A will is the end of its session, and older than the birth of the next.
    return event.state.session, _LAST_OF_SESSION if _is_will(event) else event.sequence


def _is_will(event: fleet_pb2.Event) -> bool:
    return event.HasField("state") and not event.state.online and event.sequence == 0


def _is_sign_of_life(message: Incoming) -> bool:
    """Telemetry alone: it expires at the broker, and everything else may have waited there for days."""
    return message.part in TELEMETRY and not message.retained
