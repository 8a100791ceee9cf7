"""The program `edgellm`, which ends itself at a chosen place of a build; takes the same arguments.

CUT_AT_STAGE="quantize 2" sends it CUT_SIGNAL (SIGKILL, if none is named) when that progress is told.
CUT_AT_CHANGE=N kills it before the Nth change that it makes on disk below CUT_BELOW: a file opened to be
written, a rename, a removal, a new directory. CUT_COUNT=FILE has the number that came so far written there.
TOLD=FILE has each progress as a line.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgellm_buildhost.compile import Progress

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR


class _Fate:
    """Counts changes, and ends the process at one of them."""

    def __init__(self, below: str) -> None:
        self._below = below
        self._kill_at = int(os.environ.get("CUT_AT_CHANGE", "0"))
        self._file = os.environ.get("CUT_COUNT")
        self._count = 0

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and bool(flags & _WRITES)
        else:
            path, changes = arguments[0] if arguments else None, event in _CHANGES
        # Names within a directory that is being removed are relative to it.
        if changes and isinstance(path, str | os.PathLike) and path != self._file:
            name = os.fspath(path)
            if isinstance(name, str) and (name.startswith(self._below) or os.sep not in name):
                self._change()

    def _change(self) -> None:
        self._count += 1
        if self._count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._file is not None:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(descriptor, b"%08d" % self._count, 0)
            os.close(descriptor)


@contextmanager
def _told(*, shown: bool) -> Iterator[Progress]:
    """In place of the commands' bars."""
    cut, file = os.environ.get("CUT_AT_STAGE"), os.environ.get("TOLD")
    number = signal.Signals[os.environ.get("CUT_SIGNAL", "SIGKILL")]

    def tell(stage: str, done: int, total: int) -> None:
        if file is not None:
            with open(file, "a", encoding="utf-8") as lines:  # noqa: PTH123
                lines.write(f"{stage} {done} {total}\n")
        if f"{stage} {done}" == cut:
            os.kill(os.getpid(), number)

    yield tell


def main() -> None:
    from edgellm.cli.main import main as edgellm
    from edgellm_buildhost.commands import build, quantize

    # Jobs in the background of a shell ignore interrupts, and so do their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for command in (build, quantize):
        inner = command.bars

        @contextmanager
        def bars(*, shown: bool, inner: Any = inner) -> Iterator[Progress]:
            with inner(shown=shown), _told(shown=shown) as progress:
                yield progress

        command.bars = bars
    if (below := os.environ.get("CUT_BELOW")) is not None:
        sys.addaudithook(_Fate(below).see)
    edgellm()


if __name__ == "__main__":
    main()
