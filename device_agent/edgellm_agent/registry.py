"""What the agent must remember across a restart: its engines, which one is active, how it came to be so.

SQLite with a write-ahead log.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from edgellm.sqlite import transaction
from edgellm.v1 import fleet_pb2
from edgellm_agent.lifecycle.states import State, under_way

_HISTORY_ROWS = 10_000
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
CREATE TABLE IF NOT EXISTS beside (
    digest TEXT PRIMARY KEY REFERENCES engines (digest)
) STRICT;
CREATE TABLE IF NOT EXISTS activations (
    digest TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    fallback TEXT NOT NULL,
    beside INTEGER NOT NULL CHECK (beside IN (0, 1)),
    starts INTEGER NOT NULL,
    origin TEXT NOT NULL,
    generation INTEGER NOT NULL,
    actor TEXT NOT NULL
) STRICT;
-- Outlives the engine: whoever has it again may go back to it.
CREATE TABLE IF NOT EXISTS proven (
    digest TEXT PRIMARY KEY,
    turn INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    change BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS attestations (
    digest TEXT NOT NULL REFERENCES engines (digest) ON DELETE CASCADE,
    envelope BLOB NOT NULL,
    PRIMARY KEY (digest, envelope)
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


@dataclass(frozen=True)
class Activation:
    """An engine on its way to be the active one, or one that answers beside it."""

    digest: str
    state: State
    fallback: str = ""
    """Engine to go back to; empty if there is none."""
    beside: bool = False
    starts: int = 0
    """Of the agent, since the engine is on probation."""
    origin: str = "local"
    generation: int = 0
    actor: str = ""


@dataclass(frozen=True)
class HistoryRow:
    """Something that happened to an engine; `time` is the wall clock's, seconds since 1970."""

    id: int
    time: float
    change: fleet_pb2.EngineChanged


class Registry:
    """Rows of engines and the pointer to the active one.

    Each call is one transaction, and so is all that is done within `together`.
    """

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)

    @contextmanager
    def together(self) -> Iterator[None]:
        """All calls within are on disk, or none is; within another one it is a part of that."""
        with nullcontext() if self._db.in_transaction else transaction(self._db):
            yield

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

    def beside(self) -> list[str]:
        """Digests of the engines that answer beside the active one."""
        return [str(digest) for (digest,) in self._db.execute("SELECT digest FROM beside ORDER BY digest")]

    def set_beside(self, digest: str, *, loaded: bool) -> None:
        """Has an engine answer beside the active one, or no longer."""
        if loaded:
            self._db.execute("INSERT OR IGNORE INTO beside VALUES (?)", (digest,))
        else:
            self._db.execute("DELETE FROM beside WHERE digest = ?", (digest,))

    def activations(self) -> list[Activation]:
        """Those that are under way: at most one that is worked on, and one engine on probation."""
        rows = self._db.execute(
            "SELECT digest, state, fallback, beside, starts, origin, generation, actor FROM activations"
        )
        return [
            Activation(digest, State(state), fallback, bool(beside), *rest)
            for digest, state, fallback, beside, *rest in rows
        ]

    def set_activation(self, now: Activation) -> None:
        """Where an activation is; one that has ended is forgotten."""
        if not under_way(now.state):
            self._db.execute("DELETE FROM activations WHERE digest = ?", (now.digest,))
            return
        state, by = now.state.value, (now.origin, now.generation, now.actor)
        self._db.execute(
            "INSERT OR REPLACE INTO activations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (now.digest, state, now.fallback, now.beside, now.starts, *by),
        )

    def set_proven(self, digest: str) -> None:
        """The engine has passed its probation."""
        self._db.execute(
            "INSERT OR REPLACE INTO proven SELECT ?, 1 + coalesce(max(turn), 0) FROM proven", (digest,)
        )

    def set_unproven(self, digest: str) -> None:
        """The engine has failed: nobody goes back to it."""
        self._db.execute("DELETE FROM proven WHERE digest = ?", (digest,))

    def proven(self) -> list[str]:
        """Digests of engines that have passed probation here, the last one first, gone ones included."""
        return [str(digest) for (digest,) in self._db.execute("SELECT digest FROM proven ORDER BY turn DESC")]

    def add_history(self, change: fleet_pb2.EngineChanged) -> None:
        """Remembers what happened; of very much, the latest."""
        added = self._db.execute(
            "INSERT INTO history (time, change) VALUES (?, ?)", (time.time(), change.SerializeToString())
        )
        self._db.execute("DELETE FROM history WHERE id <= ?", ((added.lastrowid or 0) - _HISTORY_ROWS,))

    def history(self, limit: int) -> list[HistoryRow]:
        """What happened, the latest first."""
        rows = self._db.execute("SELECT id, time, change FROM history ORDER BY id DESC LIMIT ?", (limit,))
        return [HistoryRow(i, at, fleet_pb2.EngineChanged.FromString(change)) for i, at, change in rows]

    def set_attestations(self, digest: str, envelopes: Iterable[bytes]) -> None:
        """Keeps what was said about an engine, in this order and in place of what was kept before."""
        with self.together():
            self._db.execute("DELETE FROM attestations WHERE digest = ?", (digest,))
            self._db.executemany(
                "INSERT INTO attestations VALUES (?, ?)", [(digest, envelope) for envelope in envelopes]
            )

    def attestations(self, digest: str) -> list[bytes]:
        """What was said about an engine: DSSE envelopes, as `set_attestations` had them."""
        rows = self._db.execute(
            "SELECT envelope FROM attestations WHERE digest = ? ORDER BY rowid", (digest,)
        )
        return [bytes(envelope) for (envelope,) in rows]

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
