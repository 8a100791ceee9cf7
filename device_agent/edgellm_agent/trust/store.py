"""What trust must remember across a restart: keys, the highest release of each name, the floor of time.

SQLite with a write-ahead log, in `trust.db`.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from edgellm.signing.keys import PublicKey

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    key_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    public_pem TEXT NOT NULL,
    not_before INTEGER,
    not_after INTEGER,
    revoked_at REAL
) STRICT;
CREATE TABLE IF NOT EXISTS releases (
    name TEXT PRIMARY KEY,
    highest INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS clock (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    floor REAL NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class KeyRow:
    """A key that was trusted or revoked here."""

    key: PublicKey
    revoked_at_s: float | None = None


class TrustStore:
    """Rows; each call is one transaction, on disk before it returns."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)

    def rows(self) -> list[KeyRow]:
        """All of them, by name."""
        rows = self._db.execute(
            "SELECT name, key_id, public_pem, not_before, not_after, revoked_at FROM keys"
            " ORDER BY name, key_id"
        )
        return [KeyRow(PublicKey(*columns), revoked_at) for *columns, revoked_at in rows]

    def trust(self, key: PublicKey) -> None:
        """Remembers a key, or its new name and validity; a revoked one stays revoked."""
        self._db.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT (key_id) DO UPDATE SET"
            " name = excluded.name, not_before = excluded.not_before, not_after = excluded.not_after",
            (key.key_id, key.name, key.pem, key.not_before_s, key.not_after_s),
        )

    def revoke(self, key: PublicKey, now_s: float) -> None:
        """Remembers that a key counts no more; the first time stays."""
        self._db.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key_id) DO UPDATE SET"
            " revoked_at = coalesce(revoked_at, excluded.revoked_at)",
            (key.key_id, key.name, key.pem, key.not_before_s, key.not_after_s, now_s),
        )

    def highest_release(self, name: str) -> int:
        """The highest release of that name that was committed here; 0 if none was."""
        row = self._db.execute("SELECT highest FROM releases WHERE name = ?", (name,)).fetchone()
        return 0 if row is None else int(row[0])

    def committed(self, name: str, release: int) -> None:
        """Remembers a release, if it is higher than what is remembered."""
        self._db.execute(
            "INSERT INTO releases VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET"
            " highest = max(highest, excluded.highest)",
            (name, release),
        )

    def floor_s(self) -> float:
        """The floor of time, seconds since 1970; 0 at first."""
        row = self._db.execute("SELECT floor FROM clock").fetchone()
        return 0.0 if row is None else float(row[0])

    def keep_floor(self, floor_s: float) -> None:
        """Remembers the floor of time."""
        self._db.execute("INSERT OR REPLACE INTO clock VALUES (1, ?)", (floor_s,))

    def close(self) -> None:
        """Closes the database."""
        self._db.close()
