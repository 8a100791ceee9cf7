"""Counts an agent's starts and connections, across its restarts."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


class SessionCounter:
    """A number per connection, or per start, that only grows, kept in a small file.

    Readers ignore a will whose number is older than the birth they know, so the number must never go back:
    where the file is damaged, it goes on from the seconds since 1970, above any count of connections.

    Args:
        path: The file.
        wall_s: Wall clock, seconds since 1970.
        lone: No other number tells one life of the device from another, so that a missing file, as on a
            device that was set up anew, counts as damaged.
    """

    def __init__(self, path: Path, *, wall_s: Callable[[], float] = time.time, lone: bool = False) -> None:
        self._path = path
        try:
            self._last = int(path.read_bytes().decode("ascii"))
        except FileNotFoundError:
            self._last = int(wall_s()) if lone else 0
        except (OSError, ValueError):
            self._last = int(wall_s())
            log.warning("mqtt.counter_damaged path=%s number=%d", path, self._last)

    @property
    def last(self) -> int:
        """The number that was taken last; 0 before the first."""
        return self._last

    def take(self) -> int:
        """Use up the next number, on disk before it is used; one that fails costs only its memory of it."""
        self._last += 1
        try:
            _replace(self._path, f"{self._last}\n")
        except OSError as error:
            log.warning("mqtt.counter_not_kept path=%s error=%s", self._path, error)
        return self._last


def _replace(path: Path, text: str) -> None:
    """Write a file so that a power cut leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
