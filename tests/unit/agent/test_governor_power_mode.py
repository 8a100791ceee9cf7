"""The privileged helper over a real socket, with a script in nvpmodel's place; and the client beside it."""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgellm_agent.governor import power_mode_helper
from edgellm_agent.governor.commands import power_mode_helper as command
from edgellm_agent.governor.power_mode import PowerModeError, PowerModes, ask_helper
from edgellm_agent.governor.power_mode_helper import NvpModel, PowerModeHelper, listen
from edgellm_agent.governor.states import State
from tests.support import virtual_time

CONF = """# Orin Nano
< POWER_MODEL ID=0 NAME=15W >
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< POWER_MODEL ID=3 NAME=REBOOT >
"""
# Notes how it was called, asks before a mode that wants a reboot, and writes down what it set.
SCRIPT = """#!/bin/sh
echo "$@" >> {root}/calls
if [ "$2" = 3 ]; then
    printf 'Reboot required. DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:'
    read answer
    [ "$answer" = YES ] || [ "$answer" = yes ] || exit 0
fi
printf 'pmode:%04d fmode:fanNull\\n' "$2" > {root}/var/lib/nvpmodel/status
"""


@pytest.fixture
def board(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    (tmp_path / "etc/nvpmodel.conf").write_text(CONF)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0000 fmode:fanNull\n")
    program = tmp_path / "nvpmodel"
    program.write_text(SCRIPT.format(root=tmp_path))
    program.chmod(0o755)
    return NvpModel(program, tmp_path)


def calls(board):
    path = board.root / "calls"
    return path.read_text().split("\n")[:-1] if path.exists() else []


@contextmanager
def helping(board, path, allowed=("15W", "25W", "REBOOT", "GONE"), user_id=None):
    user_id = os.getuid() if user_id is None else user_id
    listener = listen(path, os.getuid())
    helper = PowerModeHelper(frozenset(allowed), user_id, board)
    thread = threading.Thread(target=helper.serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()
        listener.close()


@pytest.fixture
def path(board, short_dir):
    with helping(board, short_dir / "mode.sock"):
        yield short_dir / "mode.sock"


def raw(path, request):
    """What the helper answers to these bytes."""
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(4096), b""))


async def test_an_allowed_mode_is_switched_to_by_its_number(board, path):
    await ask_helper(path, "25W")
    assert calls(board) == ["-m 1"]
    assert (board.root / "var/lib/nvpmodel/status").read_text().startswith("pmode:0001")


@pytest.mark.parametrize(
    ("mode", "why"),
    [("MAXN_SUPER", "not among the allowed"), ("GONE", "no mode GONE"), ("25w", "not among the allowed")],
)
async def test_other_modes_are_refused_and_nothing_is_run(board, path, mode, why):
    with pytest.raises(PowerModeError, match=why):
        await ask_helper(path, mode)
    assert calls(board) == []


async def test_a_mode_that_wants_a_reboot_is_told_no(board, path):
    with pytest.raises(PowerModeError, match="reboot"):
        await ask_helper(path, "REBOOT")
    assert calls(board) == ["-m 3"]
    assert (board.root / "var/lib/nvpmodel/status").read_text().startswith("pmode:0000")


async def test_a_tool_that_fails_hangs_or_is_missing_is_an_answer(board, path, monkeypatch):
    for body, why in [("exit 3", "did not switch"), ("exec sleep 60", "did not end")]:
        monkeypatch.setattr(power_mode_helper, "_SWITCH_S", 0.3 if "sleep" in body else 30)
        board.program.write_text(f"#!/bin/sh\n{body}\n")
        with pytest.raises(PowerModeError, match=why):
            await ask_helper(path, "15W")
    board.program.unlink()
    with pytest.raises(PowerModeError, match="does not start"):
        await ask_helper(path, "15W")


def test_another_user_is_refused_whatever_he_asks(board, short_dir):
    path = short_dir / "other.sock"
    with helping(board, path, user_id=os.getuid() + 1), closing(socket.socket(socket.AF_UNIX)) as client:
        path.chmod(0o666)
        short_dir.chmod(0o755)
        client.settimeout(20)
        # Root may always ask, so that a test run by root becomes a stranger while it connects.
        own = os.geteuid()
        os.seteuid(65534 if own == 0 else own)
        try:
            client.connect(str(path))
        finally:
            os.seteuid(own)
        client.sendall(b"15W\n")
        assert b"may not switch the power mode" in client.recv(500)
    assert calls(board) == []


def test_the_socket_is_for_one_user_alone(path):
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_socket_that_was_left_behind_is_replaced_and_a_file_is_not(short_dir):
    path = short_dir / "mode.sock"
    listen(path, os.getuid()).close()
    listen(path, os.getuid()).close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        listen(path, os.getuid())
    assert path.read_text() == "precious"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    request=st.one_of(
        st.binary(max_size=300),
        st.sampled_from(
            [b"", b"\n", b"15W", b"15W\n15W\n", b" 15W\n", b"15W;reboot\n", b"-m\n", b"../15W\n", b"15W\0\n"]
        ),
    ).filter(lambda r: r not in (b"15W\n", b"25W\n", b"REBOOT\n"))
)
def test_hostile_requests_are_refused_and_run_nothing(board, path, request):
    answer = raw(path, request)
    assert answer.startswith(b"error: ")
    assert answer.count(b"\n") == 1
    assert calls(board) == []


async def test_after_a_caller_that_hung_up_the_next_one_is_answered(board, path):
    for _ in range(5):
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))
    await ask_helper(path, "15W")
    assert calls(board) == ["-m 0"]


async def test_without_a_helper_there_is_one_clear_error(short_dir):
    with pytest.raises(PowerModeError, match="No such file"):
        await ask_helper(short_dir / "none.sock", "15W")


async def test_a_helper_that_says_nothing_is_given_up(short_dir):
    async def silent(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(silent, short_dir / "s.sock")
    with pytest.raises(PowerModeError, match="no answer"):
        await ask_helper(short_dir / "s.sock", "15W", deadline_s=0.05)
    server.close()


def switching(body, *, fails=False):
    """Runs a test body with a client whose clock is the virtual loop's."""

    async def main():
        switched = []

        async def switch(mode):
            switched.append((asyncio.get_running_loop().time(), mode))
            if fails:
                raise PowerModeError("broken")

        modes = PowerModes(
            {"NOMINAL": "25W", "HOT": "15W"}, switch, clock=lambda: asyncio.get_running_loop().time()
        )
        await body(modes, switched)
        await modes.close()

    virtual_time.run(main())


def test_the_mode_follows_the_state_and_not_more_often_than_every_five_minutes():
    async def body(modes, switched):
        current = "25W"
        for second in range(1000):
            modes.want(State.HOT if second % 20 < 10 else State.NOMINAL, current)
            await asyncio.sleep(1)
            current = switched[-1][1] if switched else current
        assert [mode for _, mode in switched[:3]] == ["15W", "25W", "15W"]
        assert all(b - a >= 300 for (a, _), (b, _) in itertools.pairwise(switched))

    switching(body)


def test_a_state_without_a_mode_changes_nothing():
    async def body(modes, switched):
        for state in (State.WARM, State.CRITICAL):
            modes.want(state, "25W")
        await asyncio.sleep(1)
        assert switched == []

    switching(body)


def test_a_switch_that_fails_is_tried_again_later(caplog):
    async def body(modes, switched):
        for _ in range(400):
            modes.want(State.HOT, "25W")
            await asyncio.sleep(1)
        assert len(switched) == 2

    switching(body, fails=True)
    assert caplog.text.count("power_mode.failed") == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--allow", " , "], "names no mode"),
        (["--allow", "15W", "--user", "nobody-of-that-name"], "no user"),
        (["--allow", "15W", "--user", "root", "--socket", "/nowhere/at/all.sock"], "cannot listen"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, why):
    import typer

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert why in " ".join(result.output.split())
    assert Path("/nowhere").exists() is False


def test_the_helper_takes_the_socket_that_systemd_brings(tmp_path: Path) -> None:
    path = tmp_path / "s"
    code = (
        "import os, socket\n"
        "from edgellm_agent.governor.power_mode_helper import inherited\n"
        "mine = inherited({'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'})\n"
        "print(mine.getsockname(), inherited({'LISTEN_PID': '1', 'LISTEN_FDS': '1'}), inherited({}))\n"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        given = f'exec 3<&{listener.fileno()}; exec {sys.executable} -c "$1"'
        done = subprocess.run(
            ["/bin/bash", "-c", given, "-", code],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    assert done.stdout == f"{path} None None\n"
