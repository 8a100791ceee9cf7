"""What the agent must remember across a restart: which engines it has, which one is active, what was desired.

SQLite with a write-ahead log.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS engines (
    digest TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pushing', 'ready')),
    changed_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS active (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    digest TEXT NOT NULL REFERENCES engines (digest)
) STRICT;
CREATE TABLE IF NOT EXISTS pin (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    pinned INTEGER NOT NULL CHECK (pinned IN (0, 1))
) STRICT;
CREATE TABLE IF NOT EXISTS fetched (
    digest TEXT PRIMARY KEY REFERENCES engines (digest) ON DELETE CASCADE
) STRICT;
CREATE TABLE IF NOT EXISTS desired (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    state TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class EngineRow:
    """An engine that is ready, or one on its way, whose blobs the garbage collector leaves alone."""

    digest: str
    name: str
    ready: bool
    changed_at: float


class Registry:
    """Rows of engines and the pointer to the active one. Each call is one transaction."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)

    def begin_push(self, digest: str, name: str, now: float) -> None:
        """Remembers that an engine is on its way; a ready one stays ready."""
        self._db.execute(
            "INSERT INTO engines VALUES (?, ?, 'pushing', ?)"
            " ON CONFLICT (digest) DO UPDATE SET changed_at = excluded.changed_at",
            (digest, name, now),
        )

    def end_push(self, digest: str, now: float) -> None:
        """The engine is whole."""
        self._db.execute("UPDATE engines SET state = 'ready', changed_at = ? WHERE digest = ?", (now, digest))

    def forget_pushes_before(self, time: float) -> None:
        """Gives up pushes that nobody came back to."""
        self._db.execute("DELETE FROM engines WHERE state = 'pushing' AND changed_at < ?", (time,))

    def remove(self, digest: str) -> None:
        """Forgets an engine; raises sqlite3.IntegrityError if it is the active one."""
        self._db.execute("DELETE FROM engines WHERE digest = ?", (digest,))

    def engines(self) -> list[EngineRow]:
        """All of them, oldest first."""
        rows = self._db.execute(
            "SELECT digest, name, state, changed_at FROM engines ORDER BY changed_at, digest"
        )
        return [EngineRow(d, n, s == "ready", t) for d, n, s, t in rows]

    def active(self) -> str | None:
        """Digest of the engine that answers, also after a restart."""
        row = self._db.execute("SELECT digest FROM active").fetchone()
        return None if row is None else str(row[0])

    def set_active(self, digest: str) -> None:
        """Commits to an engine."""
        self._db.execute("INSERT OR REPLACE INTO active VALUES (1, ?)", (digest,))

    def mark_fetched(self, digest: str) -> None:
        """Remembers that the fleet brought this engine, not somebody at the device."""
        self._db.execute("INSERT OR IGNORE INTO fetched VALUES (?)", (digest,))

    def fetched(self) -> list[str]:
        """Digests of the engines that the fleet brought, oldest first."""
        rows = self._db.execute(
            "SELECT digest FROM fetched JOIN engines USING (digest) ORDER BY changed_at, digest"
        )
        return [str(digest) for (digest,) in rows]

    def pinned(self) -> bool:
        """Whether the fleet may not replace the active engine."""
        row = self._db.execute("SELECT pinned FROM pin").fetchone()
        return row is not None and bool(row[0])

    def set_pinned(self, pinned: bool) -> None:
        """Pins or unpins the device."""
        self._db.execute("INSERT OR REPLACE INTO pin VALUES (1, ?)", (pinned,))

    def desired(self) -> str | None:
        """How far the device is with what its fleet desires, as `desired.rules` wrote it."""
        row = self._db.execute("SELECT state FROM desired").fetchone()
        return None if row is None else str(row[0])

    def set_desired(self, state: str) -> None:
        """Remembers it, on disk before this returns."""
        self._db.execute("INSERT OR REPLACE INTO desired VALUES (1, ?)", (state,))

    def close(self) -> None:
        """Closes the database."""
        self._db.close()
