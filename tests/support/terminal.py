"""The program `edgellm` on a terminal: keys, sizes, and what is written."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time


class Terminal:
    """A terminal with the program in it, which its Ctrl-C interrupts."""

    # A session's leader takes its standard input for its terminal.
    _CODE = (
        "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "from edgellm.cli.main import main; main()"
    )

    def __init__(self, *args: str, size: tuple[int, int] = (24, 80)) -> None:
        self.ours, self._theirs = pty.openpty()
        self.resize(*size)
        self.modes = termios.tcgetattr(self._theirs)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._CODE, *args],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
            env={**env, "TERM": "xterm-256color"},
        )
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, text: str) -> None:
        deadline_s = time.monotonic() + 30
        while text not in self.seen:
            assert select.select([self.ours], [], [], max(0.0, deadline_s - time.monotonic()))[0], self.seen
            self.seen += os.read(self.ours, 65536).decode(errors="replace")

    def press(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def ended(self) -> int:
        """The exit code, and all that was written until then."""
        code = self.process.wait(30)
        while select.select([self.ours], [], [], 0)[0]:
            self.seen += os.read(self.ours, 65536).decode(errors="replace")
        return code

    def modes_now(self) -> list:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self._theirs)
