"""Sends what waits in the backlog without flooding the network: in order, in a window, at a rate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from edgellm_agent.mqtt.backlog import Backlog
from edgellm_agent.mqtt.base import Answer, Done, Publication
from edgellm_agent.mqtt.outbox import Stored
from edgellm_agent.mqtt.unheard import Unheard

log = logging.getLogger(__name__)

# Not acknowledged yet. Brokers promise room for no more than 20 by default, and live telemetry wants some.
_WINDOW = 8
_RETRY_S = 5.0


class CatchUp:
    """Owns the task that sends, from `start` to `close`.

    Events go before telemetry, and at once: they are few, and somebody waits for them. Kept telemetry goes
    oldest first and not above a rate. What the broker refuses is kept and tried again with the next
    connection; events that nobody is subscribed to are kept until somebody is.
    """

    def __init__(
        self,
        backlog: Backlog,
        publish: Callable[[Publication, Done], bool],
        *,
        messages_per_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare; `publish` gives False where there is no connection."""
        self._backlog = backlog
        self._publish = publish
        self._pause_s = 1 / messages_per_s
        # An event that comes meanwhile waits for the rest of a batch: a quarter of a second, or one message.
        self._batch = max(1, min(_WINDOW, int(messages_per_s / 4)))
        self._sleep = sleep
        # Counts connections: what was taken for one is not sent on the next, which begins anew.
        self._connection = 0
        self._connected = False
        self._in_flight: set[int] = set()
        self._again: list[Stored] = []
        self._unheard = Unheard(self._send_again, backlog.forget)
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to wait for a connection."""
        self._task = asyncio.create_task(self._run(), name="mqtt-catch-up")

    def connected(self) -> None:
        """Send everything that waits, from its beginning."""
        self._connection += 1
        self._connected = True
        self._in_flight.clear()
        self._again.clear()
        self._unheard.clear()
        self._backlog.rewind()
        self.wake()

    def disconnected(self) -> None:
        """Send no more."""
        self._connected = False
        self._unheard.clear()
        self._room.set()

    def wake(self) -> None:
        """Look whether there is something new."""
        self._news.set()
        self._room.set()

    async def close(self) -> None:
        """Stop; what is not acknowledged stays in the backlog."""
        self._connected = False
        self._unheard.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        # The field is asked too: before Python 3.12, `wait_for` can swallow a cancellation.
        while self._task is not None:
            await self._news.wait()
            self._news.clear()
            try:
                while self._connected and await self._send_some():
                    pass
            except Exception:  # whatever it is (no memory, say), the next try may find it gone
                log.exception("mqtt.catch_up_failed")
                await self._sleep(_RETRY_S)
                self._news.set()

    async def _send_some(self) -> bool:
        """Send one batch; False when there is nothing left, or no connection."""
        connection = self._connection
        batch, self._again = self._again[: self._batch], self._again[self._batch :]
        batch = batch or await self._backlog.take(self._batch)
        for stored in batch:
            await self._window()
            if connection != self._connection:
                return True
            if not self._connected or not self._send(stored):
                return False
            if not stored.message.is_event:
                await self._sleep(self._pause_s)
        return bool(batch)

    def _send_again(self, events: list[Stored]) -> None:
        self._again.extend(events)
        self.wake()

    async def _window(self) -> None:
        while self._connected and len(self._in_flight) >= _WINDOW:
            self._room.clear()
            await self._room.wait()

    def _send(self, stored: Stored) -> bool:
        message, connection = stored.message, self._connection

        def done(answer: Answer) -> None:
            current = connection == self._connection
            if current:
                self._in_flight.discard(stored.key)
                self._room.set()
            if answer is Answer.UNHEARD and message.is_event:
                if current:
                    self._unheard.add(stored)
            elif answer is not Answer.REFUSED:
                self._backlog.forget(stored.key)
                if message.is_event:
                    self._unheard.heard(stored)

        self._in_flight.add(stored.key)
        publication = Publication(message.topic, message.payload, correlation_data=message.correlation_data)
        try:
            return self._publish(publication, done)
        except Exception:  # a message that cannot be sent is as good as refused, and holds no other back
            log.exception("mqtt.not_sent topic=%s", message.topic)
            self._in_flight.discard(stored.key)
            return True
