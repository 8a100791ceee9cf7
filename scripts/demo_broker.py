"""Starts a real MQTT broker on a free loopback port: mosquitto where it is installed, else PyPI's amqtt."""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOST = "127.0.0.1"
_MOSQUITTO = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence false
log_dest stderr
"""
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

    def __init__(self, kind: str, folder: Path, port: int | None = None) -> None:
        self.kind = kind
        self.host = HOST
        self.port = port or _free_port()
        self._log = folder / "broker.log"
        self._config = folder / "broker.conf"
        template = _MOSQUITTO if kind == "mosquitto" else _AMQTT
        self._config.write_text(template.format(port=self.port), "utf-8")
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
        raise BrokerError(f"{self.kind} did not come up: {self._log.read_text('utf-8', 'replace')[-500:]}")

    def stop(self) -> None:
        """End the process that `start` started, if it is there."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
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
def running_broker(kind: str | None = None) -> Iterator[Broker]:
    """Run a broker as long as the context lasts; without a kind, the best that is installed."""
    with tempfile.TemporaryDirectory(prefix="edgellm-broker-") as folder:
        broker = Broker(kind or ("mosquitto" if find_mosquitto() else "amqtt"), Path(folder))
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
