"""A build that is killed, stopped or shut out leaves nothing half, and the same command goes on behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgellm.bundle import Bundle
from tests.support.builds import ROOT, BuildHost, Ended
from tests.support.tiny_models import make_tiny_hf

LAYERS = 3
CUTS = 10
METHODS = {
    "int4-awq": ("--quant", "int4-awq"),
    "int4-gptq": ("--quant", "int4-gptq"),
    "auto": ("--quant", "auto", "--budget-bytes", "460000"),
}
SIGKILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("source") / "tiny", layers=LAYERS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows: what is tested here does not need more."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"The engine reads line {number} of them." for number in range(60)))
    return path


def options(method: str, text: Path) -> tuple[object, ...]:
    return (*METHODS[method], "--calibration", text, "--no-report", "--no-canary")


@pytest.fixture(scope="module")
def undisturbed(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    hosts = {method: BuildHost(tmp_path_factory.mktemp(method)) for method in METHODS}
    return {method: host.build(source, *options(method, text)) for method, host in hosts.items()}


@pytest.fixture
def host(tmp_path: Path) -> BuildHost:
    return BuildHost(tmp_path)


def identities(host: BuildHost) -> dict[str, tuple[int, int]]:
    """Inode and time of each layer on disk: a file that was written again has others."""
    (work,) = host.workspaces()
    shards = (work / ".checkpoint.partial").glob("model-*.safetensors")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


@pytest.mark.parametrize("method", METHODS)
def test_a_build_killed_between_two_layers_goes_on_behind_the_first(
    method: str, source: Path, text: Path, host: BuildHost, undisturbed: dict[str, Ended]
) -> None:
    cut = host.build(source, *options(method, text), CUT_AT_STAGE="quantize 1")
    assert cut.code == SIGKILLED
    assert host.made() == []
    before = identities(host)
    assert len(before) == 1
    # Killed again, one layer on: what was done is not touched.
    again = host.build(source, *options(method, text), CUT_AT_STAGE="quantize 2")
    assert (again.code, again.first("quantize")) == (SIGKILLED, 1)
    assert before.items() < identities(host).items()
    assert host.made() == []
    last = host.build(source, *options(method, text))
    assert last.first("quantize") == 2
    assert last.digest == undisturbed[method].digest
    assert host.made() == ["engine.bundle"]
    Bundle.open(host.target).verify()
    assert host.workspaces() == []


def test_a_build_killed_in_the_survey_asks_no_layer_twice(
    source: Path, text: Path, host: BuildHost, undisturbed: dict[str, Ended]
) -> None:
    cut = host.build(source, *options("auto", text), CUT_AT_STAGE="survey 2")
    assert cut.code == SIGKILLED
    assert host.made() == []
    again = host.build(source, *options("auto", text))
    assert (again.first("survey"), again.first("quantize")) == (2, 0)
    assert again.digest == undisturbed["auto"].digest


def test_a_build_killed_behind_the_last_layer_quantizes_none_again(
    source: Path, text: Path, host: BuildHost, undisturbed: dict[str, Ended]
) -> None:
    for cut in (f"quantize {LAYERS}", "compile 1"):
        assert host.build(source, *options("int4-gptq", text), CUT_AT_STAGE=cut).code == SIGKILLED
        assert host.made() == []
    again = host.build(source, *options("int4-gptq", text))
    assert not [line for line in again.told if line.startswith("quantize")]
    assert again.digest == undisturbed["int4-gptq"].digest


@pytest.fixture(scope="module")
def changes(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many changes on disk an undisturbed build with a survey makes."""
    host = BuildHost(tmp_path_factory.mktemp("counted"))
    count = host.root / "count"
    host.build(source, *options("auto", text), CUT_BELOW=str(host.root), CUT_COUNT=str(count))
    return int(count.read_text())


def test_a_build_makes_enough_changes_to_be_cut_at(changes: int) -> None:
    assert changes > 3 * CUTS


@pytest.mark.parametrize("cut", range(CUTS))
def test_a_build_killed_between_two_changes_on_disk_is_made_whole_by_the_next(
    cut: int, changes: int, source: Path, text: Path, host: BuildHost, undisturbed: dict[str, Ended]
) -> None:
    at = 1 + (2 * cut + 1) * changes // (2 * CUTS)
    killed = host.build(source, *options("auto", text), CUT_BELOW=str(host.root), CUT_AT_CHANGE=str(at))
    assert killed.code == SIGKILLED
    if host.target.exists():  # all that is missing may be the removal of what nobody sees
        Bundle.open(host.target).verify()
    assert host.build(source, *options("auto", text)).digest == undisturbed["auto"].digest
    assert host.workspaces() == []
    assert host.made() == ["engine.bundle"]


@pytest.mark.parametrize("stage", ["survey 1", "quantize 1", "compile 1"])
def test_ctrl_c_says_that_the_same_command_goes_on(
    stage: str, source: Path, text: Path, host: BuildHost, undisturbed: dict[str, Ended]
) -> None:
    command = ("build", source, "-o", host.target, *options("auto", text))
    stopped = host.run(*command, CUT_AT_STAGE=stage, CUT_SIGNAL="SIGINT")
    assert stopped.code == 130
    assert stopped.output == ""
    assert stopped.errors.splitlines() == [
        "interrupted; layers that are done are kept",
        "  try: run the same command again: it goes on behind them",
    ]
    assert list(host.out.iterdir()) == []
    again = host.build(source, *options("auto", text))
    assert again.digest == undisturbed["auto"].digest
    name, done = stage.split()
    if name != "compile":
        assert again.first(name) == int(done)


def test_ctrl_c_is_told_to_programs_too(source: Path, text: Path, host: BuildHost) -> None:
    stopped = host.build(source, *options("int4-gptq", text), CUT_AT_STAGE="quantize 1", CUT_SIGNAL="SIGINT")
    assert (stopped.code, stopped.output) == (130, "")
    assert '"kind": "Interrupted"' in stopped.errors
    assert len(stopped.errors.splitlines()) == 1


def test_a_quantization_that_was_interrupted_goes_on_and_leaves_nothing_beside_its_result(
    source: Path, text: Path, host: BuildHost
) -> None:
    command = ("quantize", source, "--quant", "int4-gptq", "--calibration", text, "--json", "-o")
    stopped = host.run(*command, host.out / "q", CUT_AT_STAGE="quantize 2", CUT_SIGNAL="SIGINT")
    assert stopped.code == 130
    assert host.made() == []
    again = host.run(*command, host.out / "q")
    assert (again.code, again.first("quantize")) == (0, 2)
    assert [path.name for path in host.out.iterdir()] == ["q"]
    assert host.run(*command, host.out / "whole").code == 0
    files = [{p.name: p.read_bytes() for p in (host.out / name).iterdir()} for name in ("q", "whole")]
    assert files[0] == files[1]


def test_another_request_for_the_same_output_leaves_nothing_of_the_first(
    source: Path, text: Path, host: BuildHost
) -> None:
    begun = ("quantize", source, "--calibration", text, "-o", host.out / "q", "--quant")
    assert host.run(*begun, "int4-gptq", CUT_AT_STAGE="quantize 1").code == SIGKILLED
    assert host.run(*begun, "int4-awq").code == 0
    assert [path.name for path in host.out.iterdir()] == ["q"]


@pytest.fixture
def stopped_build(source: Path, text: Path, host: BuildHost):
    """A build at work, held between two layers."""
    command = host.command("build", source, "-o", host.target, "--json", *options("int4-gptq", text))
    process = subprocess.Popen(
        command,
        env=host.environment(CUT_AT_STAGE="quantize 1", CUT_SIGNAL="SIGSTOP"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_of_two_equal_builds_at_once_the_second_is_refused_and_the_first_undisturbed(
    source: Path,
    text: Path,
    host: BuildHost,
    stopped_build: subprocess.Popen[str],
    undisturbed: dict[str, Ended],
) -> None:
    other = host.out / "other.bundle"
    second = host.run("build", source, "-o", other, *options("int4-gptq", text))
    assert second.code == 1
    message, step = second.errors.splitlines()
    assert "another process makes the same build" in message
    assert str(host.workspaces()[0]) in message
    assert step == "  try: wait for it to end, or stop it"
    assert not other.exists()
    stopped_build.send_signal(signal.SIGCONT)
    output, errors = stopped_build.communicate(timeout=60)
    assert Ended(stopped_build.returncode, output, errors, []).digest == undisturbed["int4-gptq"].digest


def test_another_build_at_once_goes_its_own_way(
    source: Path,
    text: Path,
    host: BuildHost,
    stopped_build: subprocess.Popen[str],
    undisturbed: dict[str, Ended],
) -> None:
    (begun,) = host.workspaces()
    # As if it had been at work for longer than others' leavings are kept.
    for path in (begun, *begun.iterdir()):
        os.utime(path, (0, 0))
    other = host.run("build", source, "-o", host.out / "other.bundle", "--json", *options("int4-awq", text))
    assert other.digest == undisturbed["int4-awq"].digest
    assert host.workspaces() == [begun]
    stopped_build.send_signal(signal.SIGCONT)
    output, errors = stopped_build.communicate(timeout=60)
    assert Ended(stopped_build.returncode, output, errors, []).digest == undisturbed["int4-gptq"].digest


def test_what_a_killed_build_left_is_removed_by_another_a_week_later(
    source: Path, text: Path, host: BuildHost
) -> None:
    assert host.build(source, *options("int4-gptq", text), CUT_AT_STAGE="quantize 1").code == SIGKILLED
    (left,) = host.workspaces()
    plain = ("--quant", "int4", "--no-canary")
    assert host.build(source, *plain).code == 0
    assert host.workspaces() == [left]
    eight_days_ago = time.time() - 8 * 24 * 3600
    for path in (left, *left.iterdir()):
        os.utime(path, (eight_days_ago, eight_days_ago))
    assert host.build(source, *plain).code == 0
    assert host.workspaces() == []
