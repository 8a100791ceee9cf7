"""Commands on the device: each is one run of the system's ssh, with a deadline, and asks for no password."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from edgellm.devices import SshTarget
from edgellm.errors import EdgellmError

_OPTIONS = (
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    # A link that is cut without a word is given up after 15 s.
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
)
# ssh's own failures; a command's are its own.
_SSH_FAILED = 255
_SAID_CHARACTERS = 2000


class SetupError(EdgellmError):
    """The device cannot be set up, or a step of it failed."""


@dataclass(frozen=True)
class RemoteShell:
    """A POSIX shell on the device.

    Args:
        target: Where ssh goes.
        sudo: Run what needs root by sudo; False where one logs in as root.
        config: ssh's configuration file; None means the user's and the system's.
    """

    target: SshTarget
    sudo: bool = False
    config: Path | None = None

    def run(
        self, script: str, *, root: bool = False, stdin: bytes | Path = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a script, fed from memory or from a file, whatever its exit status.

        Raises SetupError if ssh fails or time is up.
        """
        command = f"sh -c {shlex.quote(script)}"
        if root and self.sudo:
            command = f"sudo -n {command}"
        try:
            done = self._run(command, stdin, timeout_s)
        except subprocess.TimeoutExpired:
            raise SetupError(
                f"{self.target.host} did not finish within {timeout_s:.0f} s",
                "run it again: what is done is not done twice",
            ) from None
        except FileNotFoundError as error:
            if error.filename != "ssh":
                raise
            raise SetupError("there is no `ssh` on this machine", "apt install openssh-client") from None
        if done.returncode == _SSH_FAILED:
            raise SetupError(
                f"cannot log in at {self.target.host}: {last_words(done.stderr)}", f"make `{self.login}` work"
            )
        return done

    def _run(self, command: str, stdin: bytes | Path, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        line = [*self._ssh(), command]
        if isinstance(stdin, Path):
            with stdin.open("rb") as file:
                return subprocess.run(line, stdin=file, capture_output=True, timeout=timeout_s, check=False)
        return subprocess.run(line, input=stdin, capture_output=True, timeout=timeout_s, check=False)

    @property
    def login(self) -> str:
        """The command with which a person would try it."""
        port = "" if self.target.port is None else f"-p {self.target.port} "
        user = "" if self.target.user is None else f"{self.target.user}@"
        return f"ssh {port}{user}{self.target.host}"

    def _ssh(self) -> list[str]:
        config = [] if self.config is None else ["-F", str(self.config)]
        port = [] if self.target.port is None else ["-p", str(self.target.port)]
        user = [] if self.target.user is None else ["-l", self.target.user]
        # -a -x -T: the device is lent no keys, no screen, no terminal.
        return ["ssh", *config, *_OPTIONS, "-axT", *port, *user, "--", self.target.host]


def last_words(said: bytes) -> str:
    """The last line that a program wrote, without what commands a terminal."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    text = lines[-1] if lines else "it said nothing"
    return "".join(char for char in text[:_SAID_CHARACTERS] if char.isprintable())
