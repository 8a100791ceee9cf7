"""Files that may be renewed while the agent runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

log = logging.getLogger(__name__)

Value = TypeVar("Value")
_Seen: TypeAlias = tuple[tuple[int, int, int] | None, ...]


class Renewed(Generic[Value]):
    """What was made of some files, made anew when they change.

    New ones that are of no use are logged once, and the old value stays: a certificate is often written
    before its key. Any thread may ask.

    Args:
        files: Whose changes count.
        load: Reads them; raises ValueError that names what is wrong.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], Value]) -> None:
        self._files = files
        self._load = load
        self._lock = threading.Lock()
        # Looked at before they are read: a change in between is seen the next time.
        self._seen = self._look()
        self._value = load()

    def get(self) -> Value:
        """The value; reads the files if they have changed."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._value = self._load()
                except ValueError as error:
                    log.error("access.files_not_renewed error=%s", error)
                else:
                    log.info("access.files_renewed files=%s", ", ".join(str(path) for path in self._files))
            return self._value

    def _look(self) -> _Seen:
        return tuple(_look(path) for path in self._files)


def _look(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
