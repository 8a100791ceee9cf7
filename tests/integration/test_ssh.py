"""A device is reached through ssh as if it were here, and what goes wrong on the way is said in words."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from edgellm.bundle import Bundle, BundleWriter
from edgellm.client import AsyncClient, Client
from edgellm.client._ssh import Tunnel, advice
from edgellm.errors import DeviceUnreachableError, EdgellmError
from tests.support.agents import gone, wait_for
from tests.support.fake_device import FakeDevice, serve
from tests.support.sshd import Sshd, find_sshd, running_sshd
from tests.support.tiny_bundle import make_config, make_files
from tests.support.twins import connected

pytestmark = pytest.mark.skipif(find_sshd() is None, reason="there is no sshd: apt install openssh-server")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def sshd(server: Sshd) -> Sshd:
    server.configure()
    return server


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def socket_path(short_dir: Path, device: FakeDevice):
    path = short_dir / "agent.sock"
    running, _ = serve(device, f"unix://{path}")
    yield path
    device.cancelled.set()
    running.stop(grace=None).wait()


@pytest.fixture(params=["sync", "async"])
def connect(request, sshd):
    return functools.partial(connected, request.param, ssh_config=sshd.config)


@pytest.fixture
def large(tmp_path: Path) -> Bundle:
    files = make_files(tmp_path / "files", weights=os.urandom(24 << 20))
    with BundleWriter(tmp_path / "large.bundle") as writer:
        writer.add(files, make_config())
    return Bundle.open(tmp_path / "large.bundle")


def ssh_of(client) -> int:
    """The process id of the ssh of a client of either kind."""
    client = getattr(client, "_client", client)
    return client._way._tunnel._link._process.pid


async def test_an_agents_socket_is_reached_and_ssh_ends_with_the_client(connect, sshd, socket_path):
    async with connect(sshd.target(socket_path)) as client:
        assert (await client.info()).device == "fake-01"
        pid, folder = ssh_of(client), Path(getattr(client, "_client", client)._way._tunnel.socket).parent
        assert not gone(pid)
        assert folder.stat().st_mode & 0o777 == 0o700
    assert gone(pid)
    assert not folder.exists()


async def test_an_engine_is_pushed_through_it_whole(connect, sshd, socket_path, device, large):
    digest = large.variants[0].digest
    async with connect(sshd.target(socket_path)) as client:
        result = await client.push(large, digest)
        await client.activate(digest)
    assert result.sent_bytes == large.variants[0].manifest.size_bytes
    # The device has hashed every byte.
    assert device.active == digest


async def test_a_push_that_was_cut_goes_on_where_it_was_cut(connect, sshd, socket_path, device, large):
    digest = large.variants[0].digest
    async with connect(sshd.target(socket_path)) as client:
        await client.info()
        first = ssh_of(client)

        def cut(progress) -> None:
            if progress.done_bytes > progress.total_bytes // 2 and not gone(first):
                os.kill(first, signal.SIGKILL)

        with contextlib.suppress(DeviceUnreachableError):
            await client.push(large, digest, cut)
        wait_for(lambda: gone(first), "the end of ssh")
        await client.push(large, digest)
        await client.activate(digest)
    assert device.active == digest
    assert max(offset for _digest, offset in device.uploads) > 1 << 20


def test_answers_stream_through_it(sshd, socket_path, device):
    with Client(sshd.target(socket_path), ssh_config=sshd.config) as client:
        assert [chunk.text for chunk in client.generate("Hi")] == list(device.answer)


async def test_answers_stream_through_it_to_the_async_client(sshd, socket_path, device):
    async with AsyncClient(sshd.target(socket_path), ssh_config=sshd.config) as client:
        assert [chunk.text async for chunk in client.generate("Hi")] == list(device.answer)


async def test_calls_that_begin_together_share_one_ssh(connect, sshd, socket_path):
    async with connect(sshd.target(socket_path)) as client:
        answers = await asyncio.gather(*(client.info() for _ in range(8)))
        links = [thread for thread in threading.enumerate() if thread.name == "edgellm-ssh"]
    assert len(answers) == 8
    assert len(links) == 1


async def test_after_a_cut_the_next_call_connects_again(connect, sshd, socket_path):
    async with connect(sshd.target(socket_path)) as client:
        await client.info()
        first = ssh_of(client)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: gone(first), "the end of ssh")
        assert (await client.info()).device == "fake-01"
        assert ssh_of(client) != first


def test_a_stream_that_is_cut_ends_in_a_clear_error(sshd, socket_path):
    with Client(sshd.target(socket_path), ssh_config=sshd.config) as client:
        records = client.watch_telemetry(0.1)
        next(records)
        os.kill(ssh_of(client), signal.SIGKILL)
        with pytest.raises(DeviceUnreachableError, match="ssh://") as error:
            for _ in records:
                pass
    assert "again" in error.value.hint


async def test_a_stream_of_the_async_client_that_is_cut_ends_in_the_same_error(sshd, socket_path):
    async with AsyncClient(sshd.target(socket_path), ssh_config=sshd.config) as client:
        records = client.watch_telemetry(0.1)
        await anext(records)
        os.kill(ssh_of(client), signal.SIGKILL)
        with pytest.raises(DeviceUnreachableError, match="ssh://") as error:
            async for _ in records:
                pass
    assert "again" in error.value.hint


async def test_without_an_agent_there_it_says_so_and_finds_it_once_it_runs(connect, sshd, short_dir, device):
    path = short_dir / "agent.sock"
    async with connect(sshd.target(path)) as client:
        with pytest.raises(DeviceUnreachableError, match=f"no agent answers at {path}") as error:
            await client.info()
        assert "group `edgellm`" in error.value.hint
        running, _ = serve(device, f"unix://{path}")
        try:
            assert (await client.info()).device == "fake-01"
        finally:
            running.stop(grace=None).wait()


async def test_a_key_that_the_board_does_not_know_is_refused_in_words(connect, sshd, socket_path):
    sshd.configure(key="stranger")
    async with connect(sshd.target(socket_path)) as client:
        with pytest.raises(DeviceUnreachableError, match="Permission denied") as error:
            await client.info()
        assert f"ssh -p {sshd.port} " in error.value.hint
        assert "ssh-copy-id" in error.value.hint


async def test_a_host_whose_key_is_unknown_is_not_spoken_to(connect, sshd, socket_path):
    sshd.configure(known=False)
    async with connect(sshd.target(socket_path)) as client:
        with pytest.raises(DeviceUnreachableError, match="Host key verification failed") as error:
            await client.info()
        assert "compare the host's key" in error.value.hint


async def test_a_host_that_nobody_knows_is_named(connect, sshd, socket_path):
    async with connect(sshd.target(socket_path, host="board.invalid")) as client:
        with pytest.raises(DeviceUnreachableError, match=r"board\.invalid.*resolve") as error:
            await client.info()
        assert "device list" in error.value.hint


async def test_a_port_where_no_sshd_listens_is_told(connect, socket_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with connect(f"ssh://127.0.0.1:{closed.getsockname()[1]}{socket_path}") as client:
            with pytest.raises(DeviceUnreachableError, match="Connection refused"):
                await client.info()


@pytest.fixture
def silent():
    """The port of a host that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


async def test_a_host_that_says_nothing_holds_a_call_no_longer_than_its_deadline(connect, silent):
    async with connect(f"ssh://127.0.0.1:{silent}", timeout_s=0.3) as client:
        with pytest.raises(DeviceUnreachableError, match="ssh has not connected in time"):
            await client.info()
        pid = ssh_of(client)
    assert gone(pid)


async def test_closing_frees_who_waits_for_ssh(sshd, silent):
    client = AsyncClient(f"ssh://127.0.0.1:{silent}", ssh_config=sshd.config)
    waiting = client._way._tunnel.ready()
    await client.close()
    with pytest.raises(DeviceUnreachableError):
        waiting.result(timeout=5)
    with pytest.raises(DeviceUnreachableError, match="closed"):
        client._way._tunnel.ready()


def test_without_ssh_on_this_machine_it_says_what_to_install(sshd, socket_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with Client(sshd.target(socket_path)) as client, pytest.raises(DeviceUnreachableError) as error:
        client.info()
    assert "openssh-client" in error.value.hint


def test_ssh_ends_when_its_client_is_killed(sshd, socket_path, short_dir):
    script = f"""
        import sys
        from pathlib import Path
        from edgellm.client import Client
        client = Client({sshd.target(socket_path)!r}, ssh_config=Path({str(sshd.config)!r}))
        client.info()
        print(client._way._tunnel._link._process.pid, flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    # Who is killed leaves its folder behind, with a socket that nobody listens at.
    environment = os.environ | {"XDG_RUNTIME_DIR": str(short_dir)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        pid = int(process.stdout.readline())
        assert not gone(pid)
        process.kill()
        process.wait(10)
    wait_for(lambda: gone(pid), "the end of ssh")


def test_ssh_ends_with_a_program_that_forgets_to_close(sshd, socket_path):
    script = f"""
        from pathlib import Path
        from edgellm.client import Client
        client = Client({sshd.target(socket_path)!r}, ssh_config=Path({str(sshd.config)!r}))
        client.info()
        print(client._way._tunnel._link._process.pid, client._way._tunnel.socket.parent)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    pid, folder = done.stdout.split()
    assert not Path(folder).exists()
    assert gone(int(pid))


def test_the_users_ssh_configuration_cannot_lend_keys_or_share_the_connection(tmp_path):
    config = tmp_path / "config"
    config.write_text(
        "ForwardAgent yes\nForwardX11 yes\nRequestTTY force\nControlMaster auto\nControlPath /tmp/%C\n"
        "BatchMode no\nExitOnForwardFailure no\nConnectTimeout 99\nServerAliveInterval 0\nUser root\n"
    )
    tunnel = Tunnel("ssh://edge@board:2222", config)
    command = tunnel._command()
    tunnel.close()
    program = next(place for place, word in enumerate(command) if word.endswith("/ssh"))
    # ssh itself says how it understands them.
    asking = [command[program], "-G", *command[program + 1 :]]
    asked = subprocess.run(asking, check=True, capture_output=True, text=True, timeout=10)
    said = dict(line.split(" ", 1) for line in asked.stdout.splitlines() if " " in line)
    assert (said["user"], said["port"], said["hostname"]) == ("edge", "2222", "board")
    assert (said["forwardagent"], said["forwardx11"], said["controlmaster"]) == ("no", "no", "false")
    assert (said["requesttty"], said.get("controlpath", "none")) == ("false", "none")
    assert (said["batchmode"], said["exitonforwardfailure"]) == ("yes", "yes")
    assert (said["connecttimeout"], said["serveraliveinterval"]) == ("10", "5")
    assert said["localforward"] == f"{tunnel.socket} /run/edgellm/agent.sock"


@pytest.mark.parametrize(
    "target",
    [
        "ssh://-oProxyCommand=id", "ssh://-v@host", "ssh://user@-host", "ssh://host:0", "ssh://host:x",
        "ssh://ho st", "ssh://host/run/a:b", "ssh://host/a b", "ssh://$(id)", "ssh://host\n", "ssh://",
    ],
)  # fmt: skip
def test_an_address_that_ssh_could_take_for_something_else_starts_nothing(target):
    with pytest.raises(EdgellmError, match="not an address"):
        Client(target)


def test_what_ssh_says_and_we_do_not_know_leads_to_trying_it_by_hand():
    assert advice("kex_exchange: reset", "ssh edge@board") == "see what `ssh edge@board` says"


def test_the_command_line_goes_through_ssh_too(sshd, socket_path, tmp_path):
    # Stands in for the user's own ~/.ssh/config, which ssh finds by itself.
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {sshd.config} "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "EDGELLM_HOME": str(tmp_path / "home"),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
    }

    def edgellm(*words: str) -> subprocess.CompletedProcess[str]:
        program = "from edgellm.cli.main import main; main()"
        command = [sys.executable, "-c", program, "device", *words, "--json"]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    edgellm("add", "board", sshd.target(socket_path))
    assert json.loads(edgellm("info", "board").stdout)["device"] == "fake-01"
    edgellm("add", "board", sshd.target(tmp_path / "none.sock"))
    failed = edgellm("info", "board")
    assert failed.returncode == 1
    assert json.loads(failed.stderr)["error"]["kind"] == "DeviceUnreachableError"
