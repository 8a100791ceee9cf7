"""Real agents for tests: processes of their own, on a socket and a state directory of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.client import Client
from edgellm.errors import EdgellmError

START_S = 30.0


@dataclass
class Agent:
    """A running agent. `settings` are lines of its TOML file."""

    root: Path
    settings: str = ""
    prefix: tuple[str, ...] = ()
    probation_s: float = 0
    module: str = "edgellm_agent"
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def socket(self) -> Path:
        return self.root / "a.sock"

    @property
    def target(self) -> str:
        return f"unix://{self.socket}"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def log(self) -> str:
        return (self.root / "agent.log").read_text(errors="replace")

    def start(self) -> None:
        config = self.root / "agent.toml"
        config.write_text(
            'device = "jetson-test"\nprofile = "orin-nano-8gb"\nsimulate = true\n'
            "threads = 1\ntelemetry_interval_s = 0.1\n"
            f'state_dir = "{self.state}"\nsocket = "{self.socket}"\n{self.settings}\n'
        )
        with (self.root / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", self.module, "run", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "EDGELLM_AGENT_LIFECYCLE__PROBATION_S": str(self.probation_s),
                    **self.environment,
                },
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(EdgellmError), Client(self.target, timeout_s=2) as client:
                client.info()
                return
            time.sleep(0.05)
        raise AssertionError(f"the agent did not start:\n{self.log}")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(number)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the agent did not end:\n{self.log}") from None

    def worker_pid(self) -> int:
        """The only child of the agent, once it has one."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = wait_for(lambda: children.read_text().split(), "a worker")
        return int(pids[-1])

    def client(self, **options: float) -> Client:
        return Client(self.target, **options)


@contextlib.contextmanager
def running_agent(
    root: Path, settings: str = "", prefix: tuple[str, ...] = (), probation_s: float = 0
) -> Iterator[Agent]:
    agent = Agent(root, settings, prefix, probation_s)
    try:
        agent.start()
        yield agent
    finally:
        if agent.process is not None and agent.process.poll() is None:
            agent.process.send_signal(signal.SIGCONT)
            agent.stop()


def wait_for(probe, what: str, timeout_s: float = 20.0):
    """The first true value that the probe gives."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := probe():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {timeout_s} s")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
