"""The worker's sandbox from within: what is forbidden fails, what is needed works, an engine answers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.client import Constraint
from edgellm_agent.worker.sandbox import landlock
from tests.support.agents import Agent

Outcomes = dict[str, dict[str, str]]

NO_SUCH_RIGHT = {
    "connect to loopback",
    "connect to the agent's socket",
    "make a datagram pair",
    "open a netlink socket",
    "trace its parent",
    "limit its parent",
    "make a user namespace",
    "make a network namespace",
    "clone into a namespace",
    "change its root",
    "mount",
    "set the host's name",
    "look at performance counters",
    "open a ring",
    "connect in a thread",
}
READ_ONLY = {
    "make a file outside",
    "make a file in its engine",
    "truncate its engine",
    "remove its engine",
    "change a file's mode",
    "make a directory",
    "link a file",
    "rename a file",
}
OUT_OF_SIGHT = {
    "read a file outside",
    "list a directory outside",
    "read the password file",
    "overwrite a file outside",
    "overwrite its engine",
    "read its parent's memory",
    "read outside in a thread",
    "read outside in a program",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """An engine's directory, one outside of it, and a server on loopback and on a Unix socket."""
    root = tmp_path_factory.mktemp("s")
    engine, outside = root / "engine", root / "outside"
    for directory, name in ((engine, "graph"), (outside, "secret")):
        directory.mkdir()
        (directory / name).write_bytes(b"theirs")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(root / "a.sock"))
        unix.listen()
        yield [str(engine), str(outside), str(tcp.getsockname()[1]), str(root / "a.sock")]
    assert (outside / "secret").read_bytes() == (engine / "graph").read_bytes() == b"theirs"
    assert [path.name for path in outside.iterdir()] == ["secret"]


def confined(layer: str, here: list[str], *names: str) -> Outcomes:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.confined", layer, *here, *names],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def inside(here: list[str]) -> Outcomes:
    return confined("all", here)


def has_landlock() -> bool:
    try:
        return landlock.version() > 0
    except OSError:
        return False


needs_landlock = pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")


def test_what_an_engine_needs_works_inside(inside: Outcomes) -> None:
    assert {name: got for name, got in inside["needed"].items() if got != "done"} == {}


@needs_landlock
def test_every_forbidden_thing_fails_inside(inside: Outcomes) -> None:
    assert inside["problems"] == []
    assert {name for name, got in inside["forbidden"].items() if got == "done"} == set()


def test_the_filter_alone_keeps_it_from_network_processes_and_changes_of_files(here: list[str]) -> None:
    expected = dict.fromkeys(NO_SUCH_RIGHT, "EPERM") | dict.fromkeys(READ_ONLY, "EROFS")
    expected["read with a call of tomorrow"] = "ENOSYS"
    assert confined("seccomp", here, *expected)["forbidden"] == expected


@needs_landlock
def test_landlock_alone_keeps_it_from_all_files_but_its_own(here: list[str]) -> None:
    outcomes = confined("landlock", here, *OUT_OF_SIGHT)
    assert outcomes["forbidden"] == dict.fromkeys(OUT_OF_SIGHT, "EACCES")
    assert {name: got for name, got in outcomes["needed"].items() if got != "done"} == {}


def test_limits_alone_keep_it_from_writing_files_and_from_roots_powers(here: list[str]) -> None:
    expected = {"grow a file in memory": "EFBIG"}
    expected |= dict.fromkeys(("raise its limits", "set the host's name", "change its root"), "EPERM")
    assert confined("privileges", here, *expected)["forbidden"] == expected


def test_the_worker_of_a_serving_engine_is_confined(serving: Agent) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{serving.worker_pid()}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapBnd")} == {"0" * 16} or os.getuid()
    assert "sandbox: no network" in serving.log


def test_an_engine_answers_inside_and_compiles_a_grammar_there(serving: Agent) -> None:
    with serving.client() as client:
        answer = client.generate("Once", max_tokens=8, constraint=Constraint.regex("[0-9]{4}")).read()
    assert len(answer.text) == 4
    assert answer.text.isdigit()


def test_what_the_kernel_lacks_is_said_and_the_rest_holds(
    here: list[str],
) -> None:
    without = (
        "import errno, json, sys\n"
        "from pathlib import Path\n"
        "from edgellm_agent.worker.sandbox import confinement, landlock\n"
        "def refuse(grants): raise OSError(errno.EOPNOTSUPP, 'switched off')\n"
        "landlock.restrict = refuse\n"
        "print(confinement.enter(Path(sys.argv[1])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, here[0]], stdout=subprocess.PIPE, text=True, check=True, timeout=30
    )
    assert done.stdout == "no network, no new files; no Landlock: switched off\n"


def test_the_filter_holds_for_threads_that_were_there_before() -> None:
    earlier = (
        "import socket, threading\n"
        "from edgellm_agent.worker.sandbox import privileges, seccomp\n"
        "confined = threading.Event()\n"
        "def attempt():\n"
        "    confined.wait()\n"
        "    try: socket.socket()\n"
        "    except OSError as error: print(error.strerror)\n"
        "thread = threading.Thread(target=attempt)\n"
        "thread.start()\n"
        "privileges.gain_none()\n"
        "seccomp.install()\n"
        "confined.set()\n"
        "thread.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", earlier], stdout=subprocess.PIPE, text=True, check=True, timeout=30
    )
    assert done.stdout == "Operation not permitted\n"
