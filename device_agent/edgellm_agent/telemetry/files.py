"""Reads the kernel's small files without ever raising, and remembers where they were found."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from edgellm_agent.telemetry.base import Clock

# 15 digits: in whatever unit the kernel counts, scaled by 1024 it still fits a 64-bit field.
_INTEGER = re.compile(rb"-?[0-9]{1,15}")
_NATURAL = re.compile(r"[0-9]{1,15}")
_RETRY_S = 5.0
_RENEW_S = 60.0

Found = TypeVar("Found")


@dataclass(frozen=True)
class Wanted:
    """Files that a reader looks at: a pattern below the root, and of a table only the lines that matter.

    Each reader keeps its list beside it; recordings hold these files and no others.
    """

    pattern: str
    # A regular expression for the beginning of a line; None keeps the file whole.
    lines: str | None = None


def read_bytes(path: Path, limit: int) -> bytes:
    """Give the first bytes of a file; raises OSError where it cannot be read (absent, gated, offline)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, limit)
    finally:
        os.close(descriptor)


def _read(path: Path, limit: int) -> bytes | None:
    try:
        return read_bytes(path, limit)
    except (OSError, ValueError):
        return None


def read_text(path: Path, limit: int = 4096) -> str | None:
    """Give a file's text without surrounding white space and NULs; None where it cannot be read."""
    content = _read(path, limit)
    return None if content is None else content.decode("utf-8", "replace").strip(" \t\r\n\0")


def read_number(path: Path, low: int, high: int) -> int | None:
    """Give a file's integer; None where it cannot be read, is no integer or lies outside low..high.

    The bounds are those of physics: a sensor that answers -256000 m°C is off, not cold.
    """
    content = _read(path, 64)
    if content is None or _INTEGER.fullmatch(content := content.strip(b" \t\r\n\0")) is None:
        return None
    number = int(content)
    return number if low <= number <= high else None


def natural(word: str) -> int | None:
    """Give the number that a word of a kernel table stands for; None where it is none."""
    return int(word) if _NATURAL.fullmatch(word) else None


class Discovery(Generic[Found]):
    """What was found once, looked for again soon after a loss and rarely otherwise.

    Drivers load late and are reloaded under another number, so what was found is not for ever; but looking
    costs some hundred times more than reading, so it is not done at every read.
    """

    def __init__(self, look: Callable[[], Found], clock: Clock) -> None:
        self._look = look
        self._clock = clock
        self._found: Found | None = None
        self._found_ns = 0
        self._incomplete = True

    def get(self) -> Found:
        """Give what was found, after another look where that is due."""
        now = self._clock.monotonic_ns()
        wait_s = _RETRY_S if self._incomplete else _RENEW_S
        if self._found is None or now - self._found_ns >= wait_s * 1e9:
            self._found = self._look()
            self._found_ns = now
            self._incomplete = not self._found
        return self._found

    def missed(self, path: Path) -> None:
        """Tell that a path gave nothing: if it is gone, the next look comes soon."""
        if not path.exists():
            self._incomplete = True
