"""Starts a real MQTT broker on a free loopback port: mosquitto where it is installed, else PyPI's amqtt."""

import contextlib
import getpass
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"
# As root, mosquitto would become another user, who cannot read a folder of ours.
_MOSQUITTO = """\
user {user}
listener {port} 127.0.0.1
log_dest stderr
{options}
"""
# What the broker of a demo does: take everybody, and keep nothing.
OPEN = "allow_anonymous true\npersistence false"
_AMQTT = """\
listeners:
  default:
    type: tcp
    bind: 127.0.0.1:{port}
plugins:
  amqtt.plugins.authentication.AnonymousAuthPlugin:
    allow_anonymous: true
"""


class BrokerError(RuntimeError):
    """The broker did not come up; the message has the end of its log."""


class Broker:
    """A broker process with a configuration of its own; amqtt speaks MQTT 3.1.1 only."""

    def __init__(self, kind: str, folder: Path, port: int | None = None, options: str = OPEN) -> None:
        """Prepare; `options` are lines of mosquitto's configuration, amqtt has none."""
        self.kind = kind
        self.host = HOST
        self.port = port or _free_port()
        self._log = folder / "broker.log"
        self._config = folder / "broker.conf"
        template = _MOSQUITTO if kind == "mosquitto" else _AMQTT
        config = template.format(port=self.port, options=options, user=getpass.getuser())
        self._config.write_text(config, "utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def protocols(self) -> tuple[str, ...]:
        """The MQTT versions that it speaks, the best first."""
        return ("5", "3.1.1") if self.kind == "mosquitto" else ("3.1.1",)

    def start(self, deadline_s: float = 15.0) -> None:
        """Start and wait until it accepts connections; raises BrokerError if it does not."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
                return
            time.sleep(0.05)
        self.stop()
        raise BrokerError(f"{self.kind} did not come up: {self.log[-500:]}")

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text("utf-8", "replace")

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the process that `start` started, if it is there."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _command(self) -> list[str]:
        if self.kind == "mosquitto":
            return [find_mosquitto() or "mosquitto", "-c", str(self._config)]
        return [sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(self._config)]


def find_mosquitto() -> str | None:
    """Give mosquitto's path; Debian keeps it where only root's PATH looks."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin")


@contextlib.contextmanager
def running_broker(kind: str | None = None, options: str = OPEN) -> Iterator[Broker]:
    """Run a broker as long as the context lasts; without a kind, the best that is installed."""
    with tempfile.TemporaryDirectory(prefix="edgellm-broker-") as folder:
        broker = Broker(kind or ("mosquitto" if find_mosquitto() else "amqtt"), Path(folder), options=options)
        try:
            broker.start()
            yield broker
        finally:
            broker.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
