"""`edgellm device setup` against a real sshd: below a prefix, from a wheel, without a package index."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from edgellm.cli.setup import setup
from edgellm.devices import DeviceBook, SshTarget
from edgellm.setup import Options, RemoteShell, SetupError, carry_out, examine, files, plan
from edgellm.setup.facts import check
from tests.support.agents import gone, wait_for
from tests.support.ssh_host import SshHost, ssh_host

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with edgellm's wheel."""
    pytest.importorskip("hatchling")
    directory = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", directory, ROOT], check=True)
    return directory


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    """A host whose Python has all that the agent needs, but not edgellm."""
    root = tmp_path_factory.mktemp("board")
    packages, programs = root / "packages", root / "bin"
    packages.mkdir()
    programs.mkdir()
    for folder in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for entry in folder.iterdir():
            if "edgellm" not in entry.name and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry) if not (packages / entry.name).exists() else None
    (programs / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    environment = {"PYTHONPATH": str(packages), "PATH": f"{programs}:/usr/sbin:/usr/bin:/sbin:/bin"}
    with ssh_host(root, environment) as host:
        yield host


@pytest.fixture
def shell(board: SshHost) -> RemoteShell:
    return RemoteShell(SshTarget.parse(board.target), config=board.config)


@pytest.fixture
def prefix(short_dir: Path) -> Path:
    return short_dir / "opt"


def run_setup(board: SshHost, *options: str) -> tuple[int, str]:
    app = Typer()
    app.command()(setup)
    done = CliRunner().invoke(app, [board.target, "--ssh-config", str(board.config), *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


# It makes an environment, installs into it, and starts an agent: minutes on a machine with other work.
@pytest.mark.timeout(600)
def test_an_agent_is_installed_from_wheels_runs_and_is_known_by_name(
    board: SshHost, wheels: Path, prefix: Path, shell: RemoteShell
) -> None:
    options = ["--name", "bench", "--wheels", str(wheels), "--prefix", str(prefix), "--no-service"]

    code, said = run_setup(board, *options)

    assert code == 0, said
    assert DeviceBook().find("bench").target == f"ssh://board{prefix}/run/agent.sock"
    settings = (prefix / "etc/agent.toml").read_text()
    assert 'device = "bench"' in settings
    assert (prefix / "etc/agent.toml").stat().st_mode & 0o777 == 0o640
    start = said.rsplit("start ", 1)[1].strip()
    info = f"{prefix}/venv/bin/edgellm device info unix://{prefix}/run/agent.sock --json"
    agent = f"PYTHONSAFEPATH=1 {start} >{prefix}/log 2>&1 & echo $!"
    pid = int(shell.run(agent).stdout)
    try:
        told = wait_for(lambda: shell.run(info).stdout, "an answer of the agent", timeout_s=180)
        assert json.loads(told)["device"] == "bench"
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: gone(pid), "the agent's end", timeout_s=60)


def test_a_second_run_does_nothing_and_keeps_settings(board: SshHost, wheels: Path, prefix: Path) -> None:
    options = ["--wheels", str(wheels), "--prefix", str(prefix), "--no-service", "--json"]
    first = json.loads(run_setup(board, *options)[1])
    (prefix / "etc/agent.toml").write_text("# mine\n")

    second = json.loads(run_setup(board, *options)[1])

    assert {step["state"] for step in first["steps"]} == {"done"}
    assert {step["state"] for step in second["steps"]} == {"already"}
    assert (prefix / "etc/agent.toml").read_text() == "# mine\n"


def test_a_setup_that_was_cut_goes_on_and_replaces_what_is_damaged(
    shell: RemoteShell, wheels: Path, prefix: Path
) -> None:
    options = Options("bench", "orin-nano-8gb", str(prefix), wheels, service=False)
    steps = plan(options, examine(shell, str(prefix)))
    carry_out(shell, steps[:2])
    (wheel,) = (prefix / "wheels").iterdir()
    wheel.write_bytes(b"half of it")

    states = [outcome.state for outcome in carry_out(shell, steps[:3])]

    assert states == ["already", "done", "done"]
    assert wheel.read_bytes() == next(wheels.iterdir()).read_bytes()


def test_a_dry_run_tells_all_steps_and_changes_nothing(board: SshHost, wheels: Path, prefix: Path) -> None:
    code, said = run_setup(
        board, "--wheels", str(wheels), "--prefix", str(prefix), "--no-service", "--dry-run"
    )
    assert code == 0
    lines = said.splitlines()
    assert all(line.startswith("to do ") for line in lines)
    assert len(lines) == 5
    assert not prefix.exists()
    assert DeviceBook().all() == []


def test_a_step_that_fails_says_why_and_nothing_after_it_is_done(
    shell: RemoteShell, prefix: Path, tmp_path: Path
) -> None:
    (tmp_path / "edgellm-0.1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    options = Options("bench", "orin-nano-8gb", str(prefix), tmp_path, service=False)
    steps = plan(options, examine(shell, str(prefix)))
    with pytest.raises(SetupError, match=r"step failed: packages: edgellm\[agent\]"):
        carry_out(shell, steps)
    assert not (prefix / "installed").exists()
    assert not (prefix / "etc").exists()


def test_a_host_that_lets_nobody_in_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Host *\n HostName 127.0.0.1\n Port 1\n")
    shell = RemoteShell(SshTarget.parse("ssh://me@board"), config=tmp_path / "config")
    with pytest.raises(SetupError, match=r"cannot log in at board.*refused") as caught:
        examine(shell, "/opt/edgellm")
    assert caught.value.hint == "make `ssh me@board` work"


def test_what_is_missing_on_the_device_is_said_before_anything_is_done(shell: RemoteShell) -> None:
    facts = replace(
        examine(shell, "/opt/edgellm"), python=(3, 11), venv=True, free_bytes=10**10, systemd=252, root=True
    )
    check(facts, service=True)
    for change, message in (
        ({"machine": "armv7l"}, "not on Linux on armv7l"),
        ({"python": (3, 8)}, "has 3.8"),
        ({"python": None}, "has none"),
        ({"venv": False}, "cannot make environments"),
        ({"free_bytes": 10**8}, "has 100 MB free"),
        ({"systemd": None}, "not run by systemd"),
        ({"systemd": 245}, "has 245"),
        ({"root": False, "sudo": False}, "for a password"),
    ):
        with pytest.raises(SetupError, match=message):
            check(replace(facts, **change), service=True)


def test_a_service_gets_its_user_units_and_settings_in_this_order(shell: RemoteShell) -> None:
    facts = replace(examine(shell, "/opt/edgellm"), root=False, user="me")
    steps = plan(Options("jetson-01", "orin-nano-8gb", gpu=True), facts)
    titles = [step.title for step in steps]
    assert titles.index("user and group edgellm") > titles.index("file /usr/lib/sysusers.d/edgellm.conf")
    assert titles[5:] == [
        "file /etc/systemd/system/edgellm-agent.service.d/jetson.conf",
        "user and group edgellm",
        "folder /opt/edgellm",
        "Python environment /opt/edgellm/venv",
        titles[9],
        "settings /etc/edgellm/agent.toml; existing ones are kept",
        "service edgellm-agent, enabled and started",
        "the agent answers",
        "me in edgellm and edgellm-operators, to use the API and bring engines",
    ]
    assert titles[9].startswith("packages: edgellm[agent]==")
    assert all(step.root for step in steps)


@pytest.mark.parametrize("prefix", ["relative", "/with space", "/a;reboot", "/$(id)"])
def test_a_prefix_that_a_shell_would_read_otherwise_is_refused(prefix: str, shell: RemoteShell) -> None:
    with pytest.raises(SetupError, match="not a place"):
        plan(Options("a", "orin-nano-8gb", prefix, service=False), examine(shell, "/opt"))


def test_a_wheel_brings_the_files_that_a_setup_needs(wheels: Path) -> None:
    names = zipfile.ZipFile(next(wheels.iterdir())).namelist()
    needed = [*files.SERVICE_FILES, files.GPU_FILE, "agent.toml"]
    assert [name for name in needed if f"edgellm/setup/files/{name}" not in names] == []
