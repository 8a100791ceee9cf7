"""What the agent must remember across a restart: which engines it has, and which one is active.

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

    def close(self) -> None:
        """Closes the database."""
        self._db.close()
