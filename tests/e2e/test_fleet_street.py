"""The fleet's street from end to end: a real agent, the shipped broker, a server of engines, the commands."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgellm.bundle import Bundle
from edgellm.cli.main import app
from edgellm.errors import RemoteError
from tests.conftest import push
from tests.support.agents import Agent, running_agent, wait_for
from tests.support.broker import Broker, find_mosquitto, running_broker
from tests.support.pki import Authority
from tests.support.range_server import RangeServer, range_server
from tests.support.shipped_broker import CONTROLLER, shipped_options

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

DEVICE = "jetson-test"
DEADLINE_S = 30.0
# A load that brings the board near its trip point: 290 s in 15.
HEAT_UP = 'telemetry_source = "replay:heat-up?speed=20"'


@dataclass
class Cli:
    """`edgellm` with a home of its own: in this process, or as a program beside the test."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "EDGELLM_HOME": str(self.home)}

    def run(self, *arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(map(str, arguments)), env={"EDGELLM_HOME": str(self.home)})
        assert done.exit_code == code, (arguments, done.stdout, done.stderr, done.exception)
        return done.stdout

    @contextmanager
    def beside(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """The program, until the context ends."""
        command = [Path(sys.executable).parent / "edgellm", *map(str, arguments)]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@dataclass
class Street:
    """All parts; the agent of the device is shared, and each test begins with what it needs."""

    cli: Cli
    broker: Broker
    files: RangeServer
    tiny: Bundle
    other: Bundle
    agent: Agent

    def source(self, bundle: Bundle) -> str:
        return f"{self.files.url}/{bundle.path.name}"

    def wish(self, bundle: Bundle, *more: object) -> list[object]:
        return [
            "fleet",
            "set-engine",
            bundle.path,
            "--device",
            DEVICE,
            "--source",
            self.source(bundle),
            *more,
        ]

    def set_engine(self, bundle: Bundle, code: int = 0) -> dict:
        """What the device came to."""
        said = self.cli.run(*self.wish(bundle, "--wait", "--timeout", DEADLINE_S, "--json"), code=code)
        (device,) = json.loads(said)["devices"]
        return device

    def recorded(self, *wanted: tuple[str, object]) -> dict:
        """What `fleet status` says of the device, once it says this; names are paths with dots."""

        def found() -> dict | None:
            devices = json.loads(self.cli.run("fleet", "status", "--json"))["devices"]
            return next((said for said in devices if all(at(said, n) == value for n, value in wanted)), None)

        return wait_for(found, f"the status {wanted}", DEADLINE_S)

    def history(self) -> list[dict]:
        """Its events, oldest first."""
        lines = self.cli.run("fleet", "history", DEVICE, "--json").splitlines()
        return [json.loads(line)["event"] for line in lines]


def at(tree: dict, path: str) -> object:
    for name in path.split("."):
        tree = (tree or {}).get(name)
    return tree


@contextmanager
def recording(cli: Cli) -> Iterator[None]:
    """`fleet watch`, which records until it is interrupted."""
    with cli.beside("fleet", "watch") as watch:
        wait_for((cli.home / "fleet.db").exists, "the recording")
        yield
        watch.send_signal(signal.SIGINT)
        said, _ = watch.communicate(timeout=DEADLINE_S)
    assert watch.returncode == 0, said


def agent_settings(broker: Broker, files: RangeServer, authority: Authority) -> str:
    identity = authority.issue(DEVICE)
    return (
        f"{HEAT_UP}\ndrain_s = 2\n"
        f'[desired]\nsources = ["{files.url}/"]\nca_file = "{authority.ca_file}"\n'
        f'[mqtt]\nhost = "{broker.host}"\nport = {broker.port}\ngroup = "line-1"\n'
        f'[mqtt.tls]\nca_file = "{identity.ca_file}"\ncert_file = "{identity.cert_file}"\n'
        f'key_file = "{identity.key_file}"\n'
    )


@pytest.fixture(scope="module")
def street(tiny: Bundle, other_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    """A device that was born once and is away; its fleet is being recorded."""
    folder = tmp_path_factory.mktemp("street")
    authority = Authority(folder / "pki")
    engines, cli = folder / "engines", Cli(folder / "home")
    cli.home.mkdir()
    (folder / "mosquitto").mkdir()
    engines.mkdir()
    for bundle in (tiny, other_tiny):
        (engines / bundle.path.name).symlink_to(bundle.path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server = authority.issue("files", "localhost")
    tls.load_cert_chain(server.cert_file, server.key_file)
    with (
        running_broker("mosquitto", shipped_options(authority, folder / "mosquitto")) as broker,
        range_server(engines, tls) as files,
        running_agent(folder, agent_settings(broker, files, authority)) as agent,
    ):
        operator = authority.issue(CONTROLLER)
        way = ["--ca", operator.ca_file, "--cert", operator.cert_file, "--key", operator.key_file]
        url = f"mqtts://{broker.host}:{broker.port}"
        wait_for(lambda: "knows 1 devices" in cli.run("fleet", "connect", url, *way), "its birth")
        agent.stop()
        cli.run("device", "add", DEVICE, agent.target)
        with recording(cli):
            yield Street(cli, broker, files, tiny, other_tiny, agent)


@pytest.fixture
def converged(street: Street) -> Street:
    """The device is there, is not pinned, and runs what its fleet wants: the first engine."""
    if street.agent.process is None:
        street.agent.start()
    street.cli.run("engine", "unpin", "--device", DEVICE)
    assert street.set_engine(street.tiny)["phase"] == "CONVERGED"
    return street


def digest(bundle: Bundle) -> str:
    return bundle.variants[0].digest


def test_a_device_that_was_away_fetches_activates_and_reports_what_was_desired_meanwhile(street: Street):
    with street.cli.beside(*street.wish(street.tiny, "--wait", "--timeout", DEADLINE_S)) as waiting:
        street.recorded(("online", False), ("desired.engine", digest(street.tiny)))
        assert waiting.poll() is None
        street.agent.start()
        said, _ = waiting.communicate(timeout=DEADLINE_S)
    assert waiting.returncode == 0, said
    assert "CONVERGED" in said
    with street.agent.client() as client:
        assert client.info().active_engine == digest(street.tiny)
        with client.generate("Hello", max_tokens=4) as answer:
            assert "".join(chunk.text for chunk in answer) == answer.completion.text

    def steps() -> bool:
        # Events go by way of the outbox: they may come after the report.
        told = [event["engine"]["what"] for event in street.history() if "engine" in event]
        return told[-3:] == ["FETCHED", "ACTIVATED", "COMMITTED"]

    wait_for(steps, "the steps to it", DEADLINE_S)
    # The index says what is attached to the engine; all else is named by its digest.
    bundle = f"/{street.tiny.path.name}"
    assert all(
        name.startswith((f"{bundle}/blobs/sha256/", f"{bundle}/index.json")) for name in street.files.sent
    )


def test_what_is_pushed_at_the_device_overrides_its_fleet_until_the_next_generation(converged: Street):
    pushed = push(converged.agent, converged.other)
    status = converged.recorded(("reported.phase", "OVERRIDDEN"), ("reported.active_engine", pushed))
    assert status["desired"]["engine"] == digest(converged.tiny)
    assert "OVERRIDDEN" in converged.cli.run("fleet", "status")
    assert converged.set_engine(converged.tiny)["phase"] == "CONVERGED"


def test_a_pin_holds_against_a_higher_generation_and_unpinning_gives_the_device_back(converged: Street):
    converged.cli.run("engine", "pin", "--device", DEVICE)
    held = converged.set_engine(converged.other, code=1)
    assert held["phase"] == "PINNED"
    status = converged.recorded(("reported.phase", "PINNED"))
    assert status["reported"]["active_engine"] == digest(converged.tiny)
    converged.cli.run("engine", "unpin", "--device", DEVICE)
    status = converged.recorded(("reported.phase", "CONVERGED"), ("desired.engine", digest(converged.other)))
    assert status["reported"]["active_engine"] == digest(converged.other)


def test_a_worker_that_is_killed_is_in_the_history_and_the_device_answers_again(converged: Street):
    os.kill(converged.agent.worker_pid(), signal.SIGKILL)

    def told() -> list[dict]:
        return [event["worker"] for event in converged.history() if "worker" in event]

    (ended,) = wait_for(told, "the worker's end")
    assert ended["reason"] == "signal 9"
    assert ended["engine"] == digest(converged.tiny)
    with converged.agent.client() as client:

        def answers() -> bool:
            try:
                answer = client.generate("Hello", max_tokens=4, ignore_eos=True).read()
            except RemoteError:
                return False
            return answer.completion_tokens == 4

        wait_for(answers, "an answer")


def test_a_board_that_heats_up_shows_in_the_history_in_the_status_and_in_top(converged: Street):
    def heated() -> list[dict]:
        changes = [event["governor"] for event in converged.history() if "governor" in event]
        return changes if any(change["now"]["state"] == "HOT" for change in changes) else []

    changes = wait_for(heated, "a hot board", DEADLINE_S)
    assert [change["before"] for change in changes][:2] == ["NOMINAL", "WARM"]
    hot = next(change for change in changes if change["now"]["state"] == "HOT")
    assert hot["now"]["reasons"] == ["temperature"]
    assert 0 < hot["margin_celsius"] <= 5
    # It is left 120 s after it was not needed any more.
    wait_for(lambda: "HOT: temperature" in converged.cli.run("fleet", "status"), "its telemetry", DEADLINE_S)
    assert "HOT" in converged.cli.run("top", "--device", DEVICE, "--once")
