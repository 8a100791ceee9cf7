"""A real OpenSSH server on loopback, with keys and a configuration of its own, for whoever runs the tests."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S = 10.0


@dataclass
class Sshd:
    """A running server; `config` is what a client of it needs in place of ~/.ssh/config."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.folder / "client.conf"

    def target(self, socket_path: Path, host: str = "127.0.0.1") -> str:
        return f"ssh://{getpass.getuser()}@{host}:{self.port}{socket_path}"

    def configure(self, *, key: str = "user", known: bool = True) -> None:
        """Writes the client's configuration: with which key it comes, and whether it knows the host's."""
        hosts = self.folder / "known_hosts"
        host_key = (self.folder / "host.pub").read_text()
        hosts.write_text(f"[127.0.0.1]:{self.port} {host_key}" if known else "")
        self.config.write_text(
            f"IdentityFile {self.folder / key}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {hosts}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
        )


def find_sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextmanager
def running_sshd(folder: Path) -> Iterator[Sshd]:
    """Starts it on a free port, and ends it by its pid."""
    program = find_sshd()
    assert program is not None
    if os.geteuid() == 0:
        # A server that root runs wants this folder, which its package makes at boot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "user", "stranger"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(command, check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nUsePAM no\n"
    )
    with (folder / "sshd.log").open("ab") as log:
        command = [program, "-D", "-e", "-f", str(folder / "sshd.conf")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
    server = Sshd(port, folder, process)
    try:
        _wait_until_it_listens(server)
        server.configure()
        yield server
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_it_listens(server: Sshd) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and server.process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1):
            return
        time.sleep(0.02)
    raise AssertionError(f"sshd did not start:\n{(server.folder / 'sshd.log').read_text()}")
