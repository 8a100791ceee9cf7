"""An agent that a power cut ends at a chosen change of what it keeps; started as the agent itself is.

Every call that changes its files or its registry is counted: renames, links, removals, syncs, and statements
of SQLite that write. POWER_CUT_AT=N kills the process (SIGKILL) before the Nth of them; POWER_CUT_COUNT=FILE
has the number that came so far written there.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from typing import Any

_READS = ("SELECT", "PRAGMA", "CREATE")
_CHANGES = ("rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir", "fsync", "truncate", "chmod")


class _Fate:
    """Counts changes, and ends the process at one of them."""

    def __init__(self) -> None:
        self._kill_at = int(os.environ.get("POWER_CUT_AT", "0"))
        self._file = os.environ.get("POWER_CUT_COUNT")
        self._count = 0

    def change(self) -> None:
        self._count += 1
        if self._count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._file is not None:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(descriptor, b"%08d" % self._count, 0)
            os.close(descriptor)


def _doomed(fate: _Fate, call: Callable[..., Any]) -> Callable[..., Any]:
    def doomed(*arguments: Any, **options: Any) -> Any:
        fate.change()
        return call(*arguments, **options)

    return doomed


def _doom_sqlite(fate: _Fate) -> None:
    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if not sql.lstrip().upper().startswith(_READS):
                fate.change()
            return super().execute(sql, *arguments)

    connect = sqlite3.connect

    def connect_doomed(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return connect(*arguments, **{"factory": Connection, **options})

    sqlite3.connect = connect_doomed  # type: ignore[assignment]


def main() -> None:
    fate = _Fate()
    for name in _CHANGES:
        setattr(os, name, _doomed(fate, getattr(os, name)))
    _doom_sqlite(fate)
    from edgellm_agent.main import app

    app()


if __name__ == "__main__":
    main()
