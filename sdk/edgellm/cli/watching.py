"""Keeps the state of many devices up to date: one task for each, so that a slow one delays no other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

from edgellm.client import AsyncClient
from edgellm.devices import Device
from edgellm.errors import DeviceUnreachableError, EdgellmError

if TYPE_CHECKING:
    from typing_extensions import Self

    from edgellm.v1.telemetry_pb2 import Telemetry

_Item = TypeVar("_Item")

# What the sparklines show.
SPAN_S = 60.0
# A device that has not answered for so long beyond the interval is taken for gone.
ANSWER_S = 5.0
_POINTS = 600
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 15.0


class History:
    """What a figure was over the last minute; at most 600 values of it."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=_POINTS)

    def add(self, at_s: float, value: float) -> None:
        """Takes a value at a time, which never goes back."""
        self._points.append((at_s, value))

    def since(self, from_s: float) -> list[tuple[float, float]]:
        """Times and values, the oldest first."""
        return [point for point in self._points if point[0] >= from_s]


@dataclass
class Watched:
    """What is known of a device. Times are the event loop's, in seconds."""

    name: str
    target: str
    record: Telemetry | None = None
    # Why there is no record; empty while the device answers.
    failure: str = ""
    retry_at_s: float = 0.0
    celsius: History = field(default_factory=History)
    watts: History = field(default_factory=History)
    tokens_per_s: History = field(default_factory=History)

    @property
    def settled(self) -> bool:
        """Whether the first try has ended, one way or the other."""
        return self.record is not None or bool(self.failure)

    def take(self, record: Telemetry, now_s: float) -> None:
        """The device has answered."""
        self.record, self.failure = record, ""
        if record.thermal.HasField("max_celsius"):
            self.celsius.add(now_s, record.thermal.max_celsius)
        if record.power.HasField("total_mw"):
            self.watts.add(now_s, record.power.total_mw / 1000)
        if record.HasField("runtime"):
            self.tokens_per_s.add(now_s, record.runtime.decode_tokens_per_s)

    def fail(self, failure: str, retry_at_s: float) -> None:
        """The device has not answered; old figures are not shown as if they were new."""
        self.record, self.failure, self.retry_at_s = None, failure, retry_at_s


class Watch:
    """Watches devices while the context lasts; `settled` is set once each has answered or failed."""

    def __init__(
        self,
        devices: Sequence[Device],
        interval_s: float,
        *,
        answer_s: float = ANSWER_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.devices = [Watched(device.name, device.target) for device in devices]
        self._ways = list(devices)
        self.settled = asyncio.Event()
        self._interval_s = interval_s
        self._answer_s = answer_s
        self._sleep = sleep
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Starts to watch."""
        self._tasks = [
            asyncio.create_task(self._watch(*pair)) for pair in zip(self.devices, self._ways, strict=True)
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends all connections."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, device: Watched, way: Device) -> None:
        loop, pause_s = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while not self._closed:
            try:
                async for record in self._records(way):
                    device.take(record, loop.time())
                    self._note()
                    pause_s = _FIRST_PAUSE_S
                failure = f"the agent at {device.target} has stopped"
            except EdgellmError as error:
                failure = error.message
            except Exception as error:  # noqa: BLE001 - whatever one device sends, the others are shown
                failure = f"unexpected {type(error).__name__}: {error}"
            device.fail(failure, loop.time() + pause_s)
            self._note()
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _records(self, way: Device) -> AsyncIterator[Telemetry]:
        # A client of its own for each try: a channel that has failed waits longer and longer by itself.
        async with AsyncClient(way) as client:
            async for record in records(client, self._interval_s, self._answer_s):
                yield record

    def _note(self) -> None:
        if all(device.settled for device in self.devices):
            self.settled.set()


async def attended(
    items: AsyncIterator[_Item], quiet: Callable[[], Awaitable[None]], first_s: float, then_s: float
) -> AsyncIterator[_Item]:
    """The items of a device; whenever none has come for so long, `quiet` is called, and may raise.

    A device whose plug was pulled says nothing, and its connection seems to live on.
    """
    quiet_s = first_s
    async with aclosing(cast("AsyncGenerator[_Item, None]", items)):
        while True:
            coming = asyncio.ensure_future(anext(items))
            try:
                # Not `wait_for`, which before Python 3.12 can swallow a cancellation.
                while not (await asyncio.wait({coming}, timeout=quiet_s))[0]:
                    await quiet()
            finally:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            yield item
            quiet_s = then_s


def records(client: AsyncClient, interval_s: float, answer_s: float) -> AsyncIterator[Telemetry]:
    """The telemetry of a device, each record in time; raises DeviceUnreachableError when one is late."""

    async def late() -> None:
        raise DeviceUnreachableError(
            f"the device at {client.target} sends no telemetry", "check that it is up, and the way to it"
        )

    return attended(client.watch_telemetry(interval_s), late, answer_s, interval_s + answer_s)
