"""What waits for the broker, on disk: an SQLite file that survives kills and power cuts."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.sqlite import transaction

log = logging.getLogger(__name__)

_VERSION = 1
_SCHEMA = f"""
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL,
    correlation BLOB NOT NULL,
    is_event INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    created INTEGER NOT NULL
);
CREATE INDEX by_kind ON messages (is_event, id);
PRAGMA user_version = {_VERSION};
"""
# Header, index entry and the unused rest of pages, per row: what files of typical messages were seen to take.
_ROW_BYTES = 64
# More than any probe of the file holds a lock; nobody else writes it.
_BUSY_S = 5.0


@dataclass(frozen=True)
class Message:
    """One message that is to be sent with QoS 1."""

    topic: str
    payload: bytes
    is_event: bool
    # Wall clock; for people who look into the file, nothing is decided by it.
    created_ns: int
    correlation_data: bytes = b""

    @property
    def size_bytes(self) -> int:
        """What it counts for in the outbox."""
        return len(self.topic.encode()) + len(self.payload) + len(self.correlation_data) + _ROW_BYTES


@dataclass(frozen=True)
class Stored:
    """A message and its key in the outbox; keys only grow."""

    key: int
    message: Message


@dataclass(frozen=True)
class Waiting:
    """How much waits."""

    events: int = 0
    telemetry: int = 0
    bytes: int = 0

    def plus(self, events: int, telemetry: int, size_bytes: int) -> Waiting:
        """With so much more, or less."""
        return Waiting(self.events + events, self.telemetry + telemetry, self.bytes + size_bytes)


class Outbox:
    """Messages in the order in which they were added; used by one thread at a time.

    Bounded in bytes: when they run out, the oldest telemetry goes, and an event never. What `add` returned
    from is on disk. Every method raises sqlite3.OperationalError where the disk does not do its work
    (full, read-only); nothing of the call has happened then, and the next call tries again. A damaged file
    is moved aside, with what was in it, and a new one begun.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._db: sqlite3.Connection | None = None
        self._waiting = Waiting()

    @property
    def waiting(self) -> Waiting:
        """How much waits, as of the last call."""
        return self._waiting

    def open(self) -> None:
        """Open the file now rather than at the first call."""
        with self._guarded():
            pass

    def add(self, messages: Iterable[Message]) -> int:
        """Commit messages, synced to disk; gives how many of telemetry were dropped for them."""
        rows = [
            (m.topic, m.payload, m.correlation_data, m.is_event, m.size_bytes, m.created_ns) for m in messages
        ]
        events = sum(row[3] for row in rows)
        with self._guarded() as db, _transaction(db, synced=True):
            db.executemany(
                "INSERT INTO messages (topic, payload, correlation, is_event, bytes, created)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )
            grown = self._waiting.plus(events, len(rows) - events, sum(row[4] for row in rows))
            dropped, freed = _make_room(db, grown.bytes - self._limit_bytes)
        self._waiting = grown.plus(0, -dropped, -freed)
        return dropped

    def oldest(self, *, events: bool, after: int = 0, limit: int = 16) -> list[Stored]:
        """The oldest messages of a kind whose keys are above `after`."""
        with self._guarded() as db:
            rows = db.execute(
                "SELECT id, topic, payload, is_event, created, correlation FROM messages"
                " WHERE is_event = ? AND id > ? ORDER BY id LIMIT ?",
                (events, after, limit),
            ).fetchall()
        return [Stored(row[0], Message(row[1], row[2], bool(row[3]), row[4], row[5])) for row in rows]

    def delete(self, keys: Iterable[int]) -> None:
        """Forget messages that the broker has; a power cut may bring some back, to be sent once more."""
        gone: list[tuple[int, int]] = []
        with self._guarded() as db, _transaction(db, synced=False):
            for key in keys:
                gone += db.execute("DELETE FROM messages WHERE id = ? RETURNING is_event, bytes", (key,))
        events = sum(is_event for is_event, _ in gone)
        self._waiting = self._waiting.plus(-events, events - len(gone), -sum(size for _, size in gone))

    def close(self) -> None:
        """Close the file; another call opens it again."""
        db, self._db = self._db, None
        if db is not None:
            db.close()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        """The open file; one that turns out to be damaged is replaced, whether at opening or later."""
        if self._db is None:
            self._db = self._open_or_replace()
        try:
            yield self._db
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self._move_aside(error)
            raise sqlite3.OperationalError("the outbox was damaged and is begun anew") from error

    def _open_or_replace(self) -> sqlite3.Connection:
        try:
            return self._open()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self._move_aside(error)
            return self._open()

    def _open(self) -> sqlite3.Connection:
        # Opened by one thread and used by others, never by two at once.
        db = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"outbox of version {version}")
            (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            self._waiting = _count(db)
        except BaseException:
            db.close()
            raise
        return db

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        """Keep the damaged file for whoever wants to know; one that was kept before goes."""
        self.close()
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            try:
                part.replace(self._path.with_name(f"{self._path.name}.damaged{suffix}"))
            except FileNotFoundError:
                continue
            except OSError as stuck:
                raise sqlite3.OperationalError(f"a damaged outbox cannot be moved: {stuck}") from error
        self._waiting = Waiting()
        log.error("mqtt.outbox_damaged path=%s error=%s moved_to=%s.damaged", self._path, error, self._path)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, *, synced: bool) -> Iterator[None]:
    db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
    with transaction(db):
        yield


def _make_room(db: sqlite3.Connection, needed_bytes: int) -> tuple[int, int]:
    """Delete the oldest telemetry; gives how many messages and bytes went, perhaps fewer than needed."""
    dropped, freed, last = 0, 0, 0
    if needed_bytes > 0:
        for key, size in db.execute("SELECT id, bytes FROM messages WHERE is_event = 0 ORDER BY id"):
            dropped, freed, last = dropped + 1, freed + size, key
            if freed >= needed_bytes:
                break
        db.execute("DELETE FROM messages WHERE is_event = 0 AND id <= ?", (last,))
    return dropped, freed


def _count(db: sqlite3.Connection) -> Waiting:
    rows = db.execute("SELECT is_event, count(*), sum(bytes) FROM messages GROUP BY is_event").fetchall()
    count = {is_event: (number, size) for is_event, number, size in rows}
    events, telemetry = count.get(1, (0, 0)), count.get(0, (0, 0))
    return Waiting(events[0], telemetry[0], events[1] + telemetry[1])
