"""The Unix socket: who is at the other end, and what a connection may take."""

import asyncio
import contextlib
import functools
import os
import socket
import subprocess
import sys

import grpc
import grpc.aio
import pytest

from edgellm_agent.access import relay as relay_module
from edgellm_agent.access.caller import Role
from edgellm_agent.errors import PreconditionError
from tests.support.guarded import REACHED, call, guarded


async def until(probe):
    for _ in range(500):
        if value := probe():
            return value
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


# Becomes another user once all is loaded, which that one might not be allowed to read.
_BECOME = """
import os, socket, sys, grpc
path, uid, *groups = sys.argv[1:]
grpc.insecure_channel("unix:/nowhere").close()
os.setgroups([int(group) for group in groups])
os.setresgid(int(uid), int(uid), int(uid))
os.setresuid(int(uid), int(uid), int(uid))
"""
_CALLS = """
with grpc.insecure_channel("unix:" + path) as channel:
    for kind, method in (("unary_unary", "DeviceService/WhoAmI"), ("unary_stream", "EngineService/Activate")):
        try:
            answer = getattr(channel, kind)("/edgellm.v1." + method)(b"", timeout=10)
            list(answer)
        except grpc.RpcError as error:
            print(error.code().name)
"""
_CONNECTS = """
with socket.socket(socket.AF_UNIX) as client:
    try:
        client.connect(path)
    except OSError as error:
        print(type(error).__name__)
    else:
        print("connected")
"""


async def as_user(script, path, uid, *groups):
    """What a script says, run by another user."""
    command = [sys.executable, "-c", _BECOME + script, str(path), str(uid), *map(str, groups)]
    run = functools.partial(subprocess.run, command, stdout=subprocess.PIPE, timeout=60, check=True)
    return (await asyncio.to_thread(run)).stdout.decode().split()


@contextlib.asynccontextmanager
async def relayed(folder, answer):
    """A relay before a server that is not gRPC's; gives the relay and its path."""
    path = folder / "a.sock"
    relay = relay_module.Relay(path, 8, 8, lambda _: True)
    relay.prepare()
    server = await asyncio.start_unix_server(answer, relay.upstream, limit=1000)
    relay.start()
    try:
        yield relay, path
    finally:
        relay.close()
        server.close()


async def _echo(reader, writer):
    while data := await reader.read(5000):
        writer.write(data)
        await writer.drain()
    writer.close()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


class TestSocket:
    async def test_the_user_at_the_other_end_is_the_caller(self, short_dir):
        async with guarded(short_dir) as served, served.channel() as channel:
            assert (await call(channel, "TrustService/TrustKey")).details() == REACHED
        ((_, caller),) = served.behind.reached
        assert (caller.name, caller.role) == (f"uid {os.geteuid()}", Role.ADMIN)

    @needs_root
    @pytest.mark.parametrize(
        ("groups", "answers"),
        [
            ((54321,), ["UNAVAILABLE", "PERMISSION_DENIED"]),
            ((54321, 54322), ["UNAVAILABLE", "UNAVAILABLE"]),
        ],
    )
    async def test_another_user_has_the_role_of_its_groups(self, short_dir, groups, answers):
        async with guarded(short_dir, operators=("@54322",)) as served:
            os.chown(served.socket, 0, 54321)
            short_dir.chmod(0o711)
            assert await as_user(_CALLS, served.socket, 54320, *groups) == answers
        assert {caller.name for _, caller in served.behind.reached} == {"uid 54320"}

    @needs_root
    async def test_only_the_sockets_group_gets_in_and_nobody_past_it(self, short_dir):
        async with guarded(short_dir) as served:
            os.chown(served.socket, 0, 54321)
            short_dir.chmod(0o711)
            behind = short_dir / "a.sock.d" / "s"
            assert await as_user(_CONNECTS, served.socket, 54320, 54321) == ["connected"]
            assert await as_user(_CONNECTS, served.socket, 54320) == ["PermissionError"]
            assert await as_user(_CONNECTS, behind, 54320, 54321) == ["PermissionError"]

    async def test_the_socket_is_for_its_group_and_the_one_behind_it_for_nobody(self, short_dir):
        async with guarded(short_dir) as served:
            assert served.socket.stat().st_mode & 0o777 == 0o660
            assert (short_dir / "a.sock.d").stat().st_mode & 0o777 == 0o700
        assert sorted(path.name for path in short_dir.iterdir()) == ["audit"]

    async def test_whoever_comes_to_the_socket_behind_it_is_nobody(self, short_dir):
        channel = grpc.aio.insecure_channel(f"unix:{short_dir}/a.sock.d/s")
        async with guarded(short_dir) as served, channel:
            error = await call(channel, "DeviceService/GetInfo")
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert served.behind.reached == []

    async def test_whoever_gives_itself_a_name_is_still_its_user(self, short_dir):
        """A client whose socket is bound to a name of its own choice, through the socket for clients."""
        async with guarded(short_dir) as served:
            with socket.socket(socket.AF_UNIX) as named:
                named.bind("\0edgellm-00000000000000000000000000000000")
                named.connect(str(served.socket))
                relay = served.server._relay
                assert await until(lambda: len(relay._connections) == 1)
                assert relay.peer("edgellm-00000000000000000000000000000000") is None

    async def test_a_folder_of_somebody_else_is_not_used(self, short_dir):
        (short_dir / "a.sock.d").symlink_to("/tmp")
        with pytest.raises(PreconditionError, match="belongs to somebody else"):
            async with guarded(short_dir):
                pass

    @needs_root
    async def test_nor_is_one_that_was_made_by_another_user(self, short_dir):
        (short_dir / "a.sock.d").mkdir(mode=0o777)
        os.chown(short_dir / "a.sock.d", 54320, 54320)
        with pytest.raises(PreconditionError, match="belongs to somebody else"):
            async with guarded(short_dir):
                pass

    async def test_a_path_too_long_for_a_socket_names_the_setting(self, tmp_path):
        folder = tmp_path / ("x" * 90)
        with pytest.raises(PreconditionError, match="socket: the path may have 103 bytes"):
            async with guarded(folder):
                pass

    async def test_what_a_killed_agent_left_is_in_nobodys_way(self, short_dir):
        for name in ("a.sock", "a.sock.d/s"):
            (short_dir / "a.sock.d").mkdir(exist_ok=True)
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(short_dir / name))
        async with guarded(short_dir) as served, served.channel() as channel:
            assert (await call(channel, "DeviceService/GetInfo")).details() == REACHED


class TestConnections:
    async def test_a_user_has_so_many_and_they_come_free_again(self, short_dir):
        async with guarded(short_dir, max_connections_per_user=2) as served:
            relay = served.server._relay
            relay._is_admin = lambda _: False
            opened = [await self.connect(served) for _ in range(2)]
            assert await until(lambda: len(relay._connections) == 2)
            reader, writer = await self.connect(served)
            assert await reader.read() == b""
            writer.close()
            for _, writer in opened:
                writer.close()
            assert await until(lambda: not relay._connections and not relay._per_user)
            async with served.channel() as channel:
                assert (await call(channel, "DeviceService/GetInfo")).details() == REACHED

    async def test_an_admin_always_gets_in_and_its_quietest_connection_makes_room(self, short_dir):
        async def say(opened):
            opened[1].write(b"x")
            return await asyncio.wait_for(opened[0].read(1), 20)

        async with relayed(short_dir, _echo) as (relay, path):
            opened = [await asyncio.open_unix_connection(path) for _ in range(8)]
            # The one that was opened first is not the quietest.
            for each in (*opened, opened[0]):
                assert await say(each) == b"x"
            quietest = opened.pop(1)
            opened.append(await asyncio.open_unix_connection(path))
            assert await asyncio.wait_for(quietest[0].read(), 20) == b""
            for each in opened:
                assert await say(each) == b"x"
            assert len(relay._connections) == 8
            for _, writer in (*opened, quietest):
                writer.close()
            assert await until(lambda: not relay._connections)

    async def test_a_connection_that_cannot_be_set_up_leaves_nothing_behind(self, short_dir, monkeypatch):
        async with guarded(short_dir) as served:
            relay = served.server._relay
            made = []

            class Fails(relay_module._Flow):
                def start(self):
                    made.append((self._source, self._sink))
                    if len(made) == 2:
                        raise OSError(28, "no watch is left")
                    super().start()

            monkeypatch.setattr(relay_module, "_Flow", Fails)
            reader, writer = await self.connect(served)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert len(made) == 2
            assert all(end.fileno() == -1 for end in made[0])
            assert not relay._connections
            assert not relay._per_user
            async with served.channel() as channel:
                assert (await call(channel, "DeviceService/GetInfo")).details() == REACHED
            writer.close()

    async def connect(self, served):
        return await asyncio.open_unix_connection(served.socket)

    async def test_a_client_that_closes_is_forgotten(self, short_dir):
        async with guarded(short_dir) as served:
            _, writer = await self.connect(served)
            assert await until(lambda: served.server._relay._connections)
            writer.close()
            assert await until(lambda: not served.server._relay._connections)

    async def test_a_client_that_never_reads_is_ended(self, short_dir, monkeypatch):
        monkeypatch.setattr(relay_module, "STALL_S", 0.2)
        async with guarded(short_dir) as served:
            relay = served.server._relay
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(served.socket))
                (connection,) = await until(lambda: list(relay._connections.values()))
                _, from_server = connection._flows
                # As if gRPC had sent more than the client's buffer holds.
                from_server._wait(memoryview(bytes(4 << 20)))
                assert await until(lambda: not relay._connections)

    async def test_every_byte_arrives_though_both_sides_read_slowly(self, short_dir):
        sent = os.urandom(2_000_001)
        async with relayed(short_dir, _echo) as (relay, path):
            reader, writer = await asyncio.open_unix_connection(path, limit=1000)

            async def send():
                writer.write(sent)
                await writer.drain()
                writer.write_eof()

            async def receive():
                received = bytearray()
                while data := await reader.read(5000):
                    received += data
                return bytes(received)

            received, _ = await asyncio.wait_for(asyncio.gather(receive(), send()), 60)
            assert received == sent
            assert await until(lambda: not relay._connections)
            writer.close()

    async def test_whoever_does_not_answer_a_close_is_ended(self, short_dir, monkeypatch):
        monkeypatch.setattr(relay_module, "LINGER_S", 0.05)
        never = asyncio.Event()

        async def stay(_reader, writer):
            await never.wait()
            writer.close()

        async with relayed(short_dir, stay) as (relay, path):
            _, writer = await asyncio.open_unix_connection(path)
            writer.write_eof()
            assert await until(lambda: not relay._connections)
            writer.close()
            never.set()

    async def test_a_process_without_descriptors_left_takes_connections_again_later(
        self, short_dir, monkeypatch
    ):
        monkeypatch.setattr(relay_module, "_PAUSE_S", 0.05)
        async with guarded(short_dir) as served:
            relay = served.server._relay
            real, fails = relay._listener, [1, 1]

            class Listener:
                def accept(self):
                    if fails:
                        fails.pop()
                        raise OSError(24, "Too many open files")
                    return real.accept()

                def __getattr__(self, name):
                    return getattr(real, name)

            relay._listener = Listener()
            async with served.channel() as channel:
                assert (await call(channel, "DeviceService/GetInfo")).details() == REACHED
            assert not fails
