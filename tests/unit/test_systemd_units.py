"""The units that are shipped: understood by systemd, as tight as promised, and in line with the settings."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgellm_agent.config import AgentSettings
from edgellm_agent.governor.settings import GovernorSettings
from edgellm_agent.worker.sandbox.confinement import GPU_DEVICES

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = DEPLOY / "systemd"
AGENT = "edgellm-agent.service"
DROP_IN = "edgellm-agent.service.d/jetson.conf"
MOST_EXPOSED = 2.5

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian's package systemd)"
)


def directives(name: str) -> dict[str, list[str]]:
    """All values of each directive, in order."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if match := re.fullmatch(r"([A-Z]\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.fixture(params=["plain", "gpu"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The units in a directory of their own, with a program where they expect the agent's."""
    program = tmp_path / "opt/venv/bin/edgellm-agent"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    units = tmp_path / "units"
    shutil.copytree(UNITS, units)
    for unit in units.glob("*.service"):
        unit.write_text(unit.read_text().replace("/opt/edgellm", str(tmp_path / "opt")))
    if request.param == "plain":
        shutil.rmtree(units / f"{AGENT}.d")
    return units


@needs_systemd
@pytest.mark.parametrize("unit", [AGENT, "edgellm-power-mode.service", "edgellm-power-mode.socket"])
def test_systemd_has_nothing_to_say_against_a_unit(installed: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", installed / unit],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    ours = [line for line in done.stdout.splitlines() if "edgellm" in line]
    assert (done.returncode, ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize("unit", [AGENT, "edgellm-power-mode.service"])
def test_a_service_is_exposed_no_more_than_promised(installed: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", installed / unit],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None
    assert float(exposure[1]) <= MOST_EXPOSED


def test_the_places_that_may_be_written_are_those_of_the_settings() -> None:
    settings = AgentSettings(device="a")
    agent = directives(AGENT)
    assert agent["ProtectSystem"] == ["strict"]
    assert agent["StateDirectory"] == [settings.state_dir.name]
    assert settings.state_dir.parent == Path("/var/lib")
    assert agent["RuntimeDirectory"] == [settings.socket.parent.name]
    assert settings.socket.parent.parent == Path("/run")
    assert "ReadWritePaths" not in agent


def test_a_stop_leaves_time_for_running_requests_and_spares_the_worker_the_signal() -> None:
    agent = directives(AGENT)
    # The worker gets 5 s, the uplink and the rest less than 15 s.
    assert int(agent["TimeoutStopSec"][0]) >= AgentSettings(device="a").drain_s + 20
    assert agent["KillMode"] == ["mixed"]


def test_what_the_agent_needs_is_not_taken_away() -> None:
    agent = directives(AGENT)
    # /proc/meminfo; who its callers are; the socket that the helper was given before a restart.
    assert "ProcSubset" not in agent
    assert "PrivateUsers" not in agent
    assert agent["RuntimeDirectoryPreserve"] == ["yes"]
    assert agent["OOMPolicy"] == ["continue"]
    allowed = " ".join(value for value in agent["SystemCallFilter"] if not value.startswith("~")).split()
    assert {"seccomp", "landlock_restrict_self", "sched_setaffinity", "setrlimit"} <= set(allowed)


def test_the_gpus_devices_are_the_same_for_unit_and_worker() -> None:
    devices = [value.split() for value in directives(DROP_IN)["DeviceAllow"]]
    assert {rights for _, rights in devices} == {"rw"}
    names = [path.removeprefix("/dev/").split("/")[0] for path, _ in devices]
    assert [name for name in names if not any(fnmatch.fnmatch(name, each) for each in GPU_DEVICES)] == []


def test_the_helper_listens_where_the_agent_asks_and_lets_only_it_in() -> None:
    socket = directives("edgellm-power-mode.socket")
    assert socket["ListenStream"] == [str(GovernorSettings().power_mode_socket)]
    assert (socket["SocketUser"], socket["SocketMode"]) == (["edgellm"], ["0600"])
    assert "User" not in directives("edgellm-power-mode.service")


def test_services_have_the_user_that_is_made_for_them() -> None:
    made = [line.split() for line in (DEPLOY / "edgellm-sysusers.conf").read_text().splitlines()]
    ((_, user, *_),) = [words for words in made if words[0] == "u"]
    assert [words[1] for words in made if words[0] == "g"] == ["edgellm-operators"]
    agent = directives(AGENT)
    assert agent["User"] == agent["Group"] == [user]
    folders = [
        line.split() for line in (DEPLOY / "edgellm-tmpfiles.conf").read_text().splitlines() if line[0] == "d"
    ]
    assert [(path, mode, group) for _, path, mode, _, group, _ in folders] == [
        ("/etc/edgellm", "0750", user),
        ("/run/edgellm", "0750", user),
    ]
