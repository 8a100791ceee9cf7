"""What every database of this project does alike."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of what is done within, or nothing; for connections that are opened with `isolation_level=None`."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        # SQLite may have rolled back already; a commit that failed has not, and would block the next one.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
