"""Tells systemd how the agent is: sd_notify(3), over the socket that a service of Type=notify is given.

Without systemd there is no socket, and nothing is told. The watchdog is fed from the event loop: an agent
whose loop hangs stops feeding it, and systemd starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

_MICROSECONDS = 1e6


class SystemdNotifier:
    """What the service manager is told.

    Call `ready` once the API listens, `stopping` when it begins to end, `close` at the very end.

    Args:
        environment: Where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are looked up.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._interval_s = _watchdog_interval_s(environment)
        self._feeding: asyncio.Task[None] | None = None
        self._closed = False

    def ready(self) -> None:
        """The service is up; from now on the watchdog is fed."""
        self._tell("READY=1")
        if self._address and self._interval_s is not None and self._feeding is None:
            self._feeding = asyncio.create_task(self._feed(self._interval_s), name="watchdog")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._tell(f"STATUS={' '.join(text.split())}")

    def stopping(self) -> None:
        """The service ends; the watchdog is fed until it is over."""
        self._tell("STOPPING=1")

    async def close(self) -> None:
        """Feeds the watchdog no more."""
        self._closed = True
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)

    async def _feed(self, interval_s: float) -> None:
        while not self._closed:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(interval_s)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
                # A manager that does not read must not hold up the loop.
                manager.setblocking(False)
                manager.sendto(state.encode(), self._address)
        except OSError as error:
            log.warning("systemd was not told %s: %s", state.partition("=")[0], error.strerror or error)


def _address(name: str) -> str | bytes:
    """The socket's address: a path, or an abstract name, which is written with an @."""
    if name.startswith("@"):
        return b"\0" + os.fsencode(name[1:])
    return name if name.startswith("/") else ""


def _watchdog_interval_s(environment: Mapping[str, str]) -> float | None:
    """Half of the time that systemd waits; None if it watches nobody, or another process."""
    with contextlib.suppress(KeyError, ValueError):
        if int(environment.get("WATCHDOG_PID", os.getpid())) == os.getpid():
            return max(int(environment["WATCHDOG_USEC"]) / _MICROSECONDS / 2, 0.001)
    return None
