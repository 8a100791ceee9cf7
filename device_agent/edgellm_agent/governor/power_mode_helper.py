"""The small part that needs root: switches the power mode, to names on a list, for one user.

It listens on a Unix socket that this user alone may open, asks the kernel who is there (SO_PEERCRED), takes
one line with a mode's name, and answers `ok` or `error: …`. A mode that wants a reboot is not taken:
nvpmodel asks, and hears no.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import stat
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgellm_agent.governor.settings import MODE_PATTERN
from edgellm_agent.telemetry.power import power_modes

log = logging.getLogger(__name__)

_REQUEST_S = 5.0
_SWITCH_S = 30.0
_LONGEST_REQUEST_BYTES = 1024
_LARGEST_CONF_BYTES = 1 << 20
_FIRST_INHERITED = 3
_CREDENTIALS = struct.Struct("3i")
_NAME = re.compile(MODE_PATTERN.removesuffix("$") + r"\Z")
_STATUS = re.compile(r"pmode:([0-9]{1,4})\b")


class RefusedError(Exception):
    """Why not, in words for the caller."""


@dataclass(frozen=True)
class NvpModel:
    """NVIDIA's tool, its table of modes, and the file in which it notes the mode that it set."""

    program: Path = Path("/usr/sbin/nvpmodel")
    root: Path = Path("/")

    def switch(self, name: str) -> None:
        """Switches to a mode; raises RefusedError."""
        number = self._number(name)
        try:
            done = subprocess.run(
                [self.program, "-m", str(number)],
                input=b"no\n",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_SWITCH_S,
                cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RefusedError(f"nvpmodel did not end within {_SWITCH_S:.0f} s") from None
        except OSError as error:
            raise RefusedError(f"nvpmodel does not start: {error.strerror}") from None
        if done.returncode != 0 or self._current() != number:
            log.warning("nvpmodel -m %d: %s", number, done.stdout[-500:].decode(errors="replace").strip())
            raise RefusedError(f"nvpmodel did not switch to {name}; a mode that wants a reboot is not taken")

    def _number(self, name: str) -> int:
        try:
            with (self.root / "etc/nvpmodel.conf").open(errors="replace") as conf:
                modes = power_modes(conf.read(_LARGEST_CONF_BYTES))
        except OSError as error:
            raise RefusedError(f"no /etc/nvpmodel.conf: {error.strerror}") from None
        number = next((number for number, mode in modes.items() if mode == name), None)
        if number is None:
            raise RefusedError(f"this board has no mode {name}")
        return number

    def _current(self) -> int | None:
        try:
            text = (self.root / "var/lib/nvpmodel/status").read_text(errors="replace")
        except OSError:
            return None
        match = _STATUS.match(text)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class PowerModeHelper:
    """Answers one caller at a time."""

    allowed: frozenset[str]
    user_id: int
    nvpmodel: NvpModel

    def serve(self, listener: socket.socket) -> None:
        """Answers callers until the socket is shut down."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return
                raise
            with connection, contextlib.suppress(OSError):  # a caller that went away is no loss
                self.answer(connection)

    def answer(self, connection: socket.socket) -> None:
        """Reads one request and answers it."""
        connection.settimeout(_REQUEST_S)
        try:
            # Read first: what is closed unread may take its answer along.
            line = _read_line(connection)
            self._check_caller(connection)
            name = self._check_mode(line)
            self.nvpmodel.switch(name)
        except RefusedError as error:
            log.warning("refused: %s", error)
            connection.sendall(f"error: {error}\n".encode())
        else:
            log.info("switched to %s", name)
            connection.sendall(b"ok\n")

    def _check_caller(self, connection: socket.socket) -> None:
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user_id, _ = _CREDENTIALS.unpack(packed)
        if user_id not in (0, self.user_id):
            raise RefusedError(f"user {user_id} may not switch the power mode")

    def _check_mode(self, line: bytes) -> str:
        name = line.removesuffix(b"\n").decode("ascii", "replace")
        if not line.endswith(b"\n") or not _NAME.match(name):
            raise RefusedError("a request is one line: the name of a mode")
        if name not in self.allowed:
            raise RefusedError(f"{name} is not among the allowed modes")
        return name


def _read_line(connection: socket.socket) -> bytes:
    """What came, to a line's end or to the longest that a request may be."""
    request = b""
    while b"\n" not in request and len(request) < _LONGEST_REQUEST_BYTES:
        more = connection.recv(_LONGEST_REQUEST_BYTES)
        if not more:
            break
        request += more
    return request


def inherited(environment: Mapping[str, str]) -> socket.socket | None:
    """The socket that systemd made for this process (sd_listen_fds(3)), if it did.

    It is the first and only one, and who may open it is the socket unit's to say.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()) or environment.get("LISTEN_FDS") != "1":
        return None
    return socket.socket(fileno=_FIRST_INHERITED)


def listen(path: Path, user_id: int) -> socket.socket:
    """A socket that only this user, and root, may open; takes the place of one that was left behind.

    Raises OSError, also where something else has that name.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(f"{path} is there, and is not a socket")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        os.chown(path, user_id, -1)
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old_mask)
    return listener
