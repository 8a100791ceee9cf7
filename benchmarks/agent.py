"""A real agent in a process of its own, on a Unix socket in a folder of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import tomli_w

from edgellm.client import Client
from edgellm.errors import EdgellmError

_START_S = 30.0


class AgentProcess:
    """A started agent; `running_agent` ends it."""

    def __init__(self, process: subprocess.Popen[bytes], target: str, log: Path) -> None:
        self.process = process
        self.target = target
        self._log = log

    def client(self) -> Client:
        """A client of its own for the caller, who closes it."""
        return Client(self.target)

    def worker_pid(self) -> int | None:
        """The engine worker's process, if there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                # Before its exec the child is still a copy of the agent.
                with contextlib.suppress(psutil.Error):
                    if "edgellm_agent.worker" in child.cmdline():
                        return int(child.pid)
        return None

    def wait_until_ready(self) -> None:
        """Returns when the agent answers; raises RuntimeError with the end of its log if it does not."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(EdgellmError), Client(self.target, timeout_s=2) as client:
                client.info()
                return
            time.sleep(0.02)
        raise RuntimeError(f"the agent did not start: {self._log.read_text('utf-8', 'replace')[-500:]}")


@contextlib.contextmanager
def running_agent(scratch: Path, settings: Mapping[str, object]) -> Iterator[AgentProcess]:
    """An agent with these settings, whose state lies below `scratch`, for as long as the context lasts."""
    scratch.mkdir(parents=True, exist_ok=True)
    # A socket's path has to be short; the state may lie deep.
    with (
        tempfile.TemporaryDirectory(prefix="edgellm-bench-") as short,
        tempfile.TemporaryDirectory(prefix="agent-", dir=scratch) as state,
    ):
        socket, config, log = (Path(short) / name for name in ("agent.sock", "agent.toml", "agent.log"))
        places = {"device": "bench", "socket": str(socket), "state_dir": state}
        config.write_text(tomli_w.dumps({**places, **settings}), "utf-8")
        command = [str(Path(sys.executable).parent / "edgellm-agent"), "run", "--config", str(config)]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            agent = AgentProcess(process, f"unix://{socket}", log)
            agent.wait_until_ready()
            yield agent
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
