"""What systemd is told, heard on a real datagram socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm_agent.sd_notify import SystemdNotifier


class Manager:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.name = address.replace("\0", "@", 1)

    async def next(self) -> str:
        return (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._socket, 4096), 10)).decode()

    def rest(self) -> list[str]:
        told = []
        with contextlib.suppress(BlockingIOError):
            while True:
                told.append(self._socket.recv(4096).decode())
        return told

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, short_dir: Path) -> Iterator[Manager]:
    address = str(short_dir / "n") if request.param == "path" else f"\0edgellm-{os.getpid()}-{id(request)}"
    listening = Manager(address)
    yield listening
    listening.close()


async def test_ready_status_and_stopping_are_told_in_turn(manager: Manager) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": manager.name})
    notifier.ready()
    notifier.status("serving\nsmollm2")
    notifier.stopping()
    await notifier.close()
    assert manager.rest() == ["READY=1", "STATUS=serving smollm2", "STOPPING=1"]


async def test_the_watchdog_is_fed_again_and_again_until_the_end(manager: Manager) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "20000"})
    notifier.ready()
    assert [await manager.next() for _ in range(4)] == ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"]
    notifier.stopping()
    assert "WATCHDOG=1" in [await manager.next() for _ in range(3)]
    await notifier.close()
    assert {task.get_name() for task in asyncio.all_tasks()} & {"watchdog"} == set()


async def test_half_of_the_watchdogs_time_passes_between_two_meals(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    forever = asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await forever.wait()

    monkeypatch.setattr("edgellm_agent.sd_notify.asyncio.sleep", sleep)
    notifier = SystemdNotifier({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "30000000"})
    notifier.ready()
    assert [await manager.next(), await manager.next()] == ["READY=1", "WATCHDOG=1"]
    await notifier.close()
    assert slept == [15.0]


async def test_another_process_watchdog_is_not_fed(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    notifier = SystemdNotifier(environment)
    notifier.ready()
    await asyncio.sleep(0)
    await notifier.close()
    assert manager.rest() == ["READY=1"]


@pytest.mark.parametrize("name", ["", "relative", "vsock:2:1"])
async def test_without_a_socket_that_it_knows_it_tells_nobody(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000"})
    notifier.ready()
    await notifier.close()
    assert caplog.records == []


async def test_a_manager_that_does_not_listen_does_no_harm(
    short_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SystemdNotifier({"NOTIFY_SOCKET": str(short_dir / "gone")}).ready()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
