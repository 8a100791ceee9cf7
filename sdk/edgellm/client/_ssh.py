"""A tunnel to an agent's Unix socket through the system's ssh: who may log in there needs no other key."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from edgellm.devices import SshTarget
from edgellm.errors import DeviceUnreachableError

# What ssh gets to connect and log in; TCP alone gets half of it.
CONNECT_S = 20.0
# How long the agent behind the tunnel may take to say its first byte.
_ANSWER_S = 5.0
# A link that is cut without a word is given up after three times 5 s.
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ControlMaster": "no",
    "ControlPath": "none",
    "ExitOnForwardFailure": "yes",
    "ServerAliveCountMax": "3",
    "ServerAliveInterval": "5",
    "StreamLocalBindUnlink": "yes",
}
_POLL_S = 0.02
# How soon an ssh is missed that died and left its standard error open to a helper of its own.
_LISTEN_S = 1.0
_END_S = 3.0
# How an HTTP/2 client begins (RFC 9113, section 3.4): connection preface and an empty SETTINGS frame.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
# The longest path of a socket that Linux binds, less what the name below the folder takes.
_LONGEST_FOLDER = 107 - len("/a.sock")

# What ssh says last, and what to do about it.
_ADVICE = (
    ("host key verification failed", "run `{login}` once and compare the host's key before you accept it"),
    ("permission denied", "make `{login}` work without a password: with `ssh-copy-id`, or `ssh-add`"),
    ("too many authentication failures", "name one key in ~/.ssh/config, with IdentitiesOnly yes"),
    ("could not resolve hostname", "check the host's name with `edgellm device list`"),
    ("connection refused", "check that the board is on and runs sshd, and the port"),
    ("timed out", "check that the board is on and the network between"),
    ("timeout", "check that the board is on and the network between"),
    ("no route to host", "check that the board is on and the network between"),
)  # fmt: skip


class Tunnel:
    """One ssh process at a time, with a local socket at its end; started when needed, and again when it died.

    The process ends with `close`, with this object, and with the process that made it, however that ends.

    Args:
        target: `ssh://[user@]host[:port][/path/to/agent.sock]`; raises EdgellmError if malformed.
        config: ssh's configuration file; None means the user's and the system's.
    """

    def __init__(self, target: str, config: Path | None = None) -> None:
        self.target = target
        self._ssh = SshTarget.parse(target)
        self._config = config
        self._folder = _private_folder()
        self.socket = self._folder / "a.sock"
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._closed = False
        # Also when nobody closes it, and at the interpreter's end.
        self._release = weakref.finalize(self, _release, self._folder, None)

    def ready(self) -> Future[None]:
        """Is done once the agent answers through the tunnel; gives DeviceUnreachableError if it does not.

        All who ask while it connects get the same future.
        """
        with self._lock:
            if self._closed:
                raise DeviceUnreachableError(f"the way to {self.target} is closed", "make a new client")
            if self._link is None or not self._link.usable:
                self._link = _Link(self.target, self._ssh, self.socket, self._command())
                self._release.detach()
                self._release = weakref.finalize(self, _release, self._folder, self._link)
            return self._link.ready

    def close(self) -> None:
        """Ends ssh, and waits a little until it has ended."""
        with self._lock:
            self._closed = True
        self._release()

    def _command(self) -> list[str]:
        program = shutil.which("ssh")
        if program is None:
            raise DeviceUnreachableError(
                f"cannot reach {self.target}: there is no `ssh` on this machine",
                "install OpenSSH's client: `apt install openssh-client`",
            )
        # The kernel ends ssh when we are killed; setpriv is part of util-linux, which every Linux has.
        setpriv = shutil.which("setpriv")
        guard = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
        options = [f"-o{name}={value}" for name, value in _OPTIONS.items()]
        config = [] if self._config is None else ["-F", str(self._config)]
        port = [] if self._ssh.port is None else ["-p", str(self._ssh.port)]
        user = [] if self._ssh.user is None else ["-l", self._ssh.user]
        # -a -x -T: the board is lent no keys, no screen, no terminal; -N: nothing runs there.
        forward = ["-axTN", "-L", f"{self.socket}:{self._ssh.socket}"]
        return [*guard, program, *config, *options, *port, *user, *forward, "--", self._ssh.host]


class _Link:
    """One run of ssh, from start to end, in a thread of its own.

    The kernel signals a child when the *thread* that started it ends; so this one lives as long as ssh.
    """

    def __init__(self, name: str, ssh: SshTarget, path: Path, command: list[str]) -> None:
        self.ready: Future[None] = Future()
        # From now on nobody who waits can cancel it for the others.
        self.ready.set_running_or_notify_cancel()
        self._name, self._ssh, self._path, self._command = name, ssh, path, command
        self._said = b""
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="edgellm-ssh", daemon=True)
        self._thread.start()

    @property
    def usable(self) -> bool:
        """Whether it still connects, or has connected and lives."""
        if not self.ready.done():
            return True
        alive = self._process is not None and self._process.poll() is None
        return alive and self.ready.exception() is None

    def end(self) -> None:
        """Ends ssh, and waits until its thread has seen that."""
        self._ended.set()
        process = self._process
        if process is not None:
            # Wakes the thread: it listens until ssh has closed its standard error.
            process.terminate()
        self._thread.join(2 * _END_S)

    def _run(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            failure = DeviceUnreachableError(f"ssh cannot be started: {error}", "see what `ssh -V` says")
            self.ready.set_exception(failure)
            return
        try:
            self._connect(self._process)
        except (DeviceUnreachableError, OSError) as error:
            # Told once it is over: the next ssh must not meet this one at the same socket.
            _stop(self._process)
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while self._process.poll() is None and not self._ended.is_set():
                self._listen(self._process, _LISTEN_S)
        finally:
            _stop(self._process)

    def _connect(self, process: subprocess.Popen[bytes]) -> None:
        """Returns once the agent has answered; raises DeviceUnreachableError."""
        deadline_s = time.monotonic() + CONNECT_S
        while (probe := self._dial()) is None:
            if process.poll() is not None:
                raise self._refused(process)
            if self._ended.is_set() or time.monotonic() > deadline_s:
                why = "closed" if self._ended.is_set() else f"ssh has not connected within {CONNECT_S:g} s"
                raise DeviceUnreachableError(f"cannot reach {self._name}: {why}", f"try `{self._login}`")
            self._listen(process, _POLL_S)
        with probe:
            if not _answers(probe):
                raise DeviceUnreachableError(
                    f"ssh reaches {self._ssh.host}, but no agent answers at {self._ssh.socket} there",
                    "check on the board that edgellm-agent runs, and that you are in the group `edgellm`",
                )

    def _dial(self) -> socket.socket | None:
        """A connection to our end of the tunnel; None while ssh does not listen yet."""
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.connect(str(self._path))
        except OSError:
            probe.close()
            return None
        return probe

    def _listen(self, process: subprocess.Popen[bytes], wait_s: float) -> bool:
        """Takes what ssh says within that time, and whether it said something; the last words are kept."""
        if process.stderr is None:
            return False
        # Not select(), which takes no descriptor above 1023.
        poll = select.poll()
        poll.register(process.stderr, select.POLLIN)
        if not poll.poll(1000 * wait_s):
            return False
        said = os.read(process.stderr.fileno(), 4096)
        self._said = (self._said + said)[-4096:]
        if not said:
            # It has closed it, and will be gone in a moment.
            self._ended.wait(min(wait_s, _POLL_S))
        return bool(said)

    def _refused(self, process: subprocess.Popen[bytes]) -> DeviceUnreachableError:
        for _ in range(16):
            if not self._listen(process, 0):
                break
        lines = self._said.decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        why = last or f"ssh ended with status {process.returncode}"
        return DeviceUnreachableError(f"cannot reach {self._name}: {why}", advice(why, self._login))

    @property
    def _login(self) -> str:
        """The command with which a person would try it."""
        port = "" if self._ssh.port is None else f"-p {self._ssh.port} "
        user = "" if self._ssh.user is None else f"{self._ssh.user}@"
        return f"ssh {port}{user}{self._ssh.host}"


def advice(said: str, login: str) -> str:
    """What to do about the last words of ssh; `login` is the command to try by hand."""
    lowered = said.lower()
    found = next((text for words, text in _ADVICE if words in lowered), "see what `{login}` says")
    return found.format(login=login)


def _answers(probe: socket.socket) -> bool:
    """Whether an HTTP/2 server is behind the tunnel; ssh hangs up if nobody is there."""
    probe.settimeout(_ANSWER_S)
    with suppress(OSError):
        probe.sendall(_HELLO)
        return bool(probe.recv(1))
    return False


def _release(folder: Path, link: _Link | None) -> None:
    if link is not None:
        link.end()
    shutil.rmtree(folder, ignore_errors=True)


def _private_folder() -> Path:
    """A folder of ours alone, with a path that leaves room for a socket's name."""
    # Short ones come first; mkdtemp makes a folder that only we may enter.
    for parent in (os.environ.get("XDG_RUNTIME_DIR") or "/tmp", "/tmp", tempfile.gettempdir()):  # noqa: S108
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="edgellm-", dir=parent))
            if len(os.fsencode(folder)) <= _LONGEST_FOLDER and ":" not in str(folder):
                return folder
            folder.rmdir()
    raise DeviceUnreachableError(
        "there is no folder for a tunnel's socket", "set TMPDIR to a short path that you may write to"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stderr is not None:
        process.stderr.close()
