"""Events that the broker took while nobody was subscribed: after its restart, a device may be back first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from edgellm_agent.mqtt.outbox import Stored

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 600.0
# A device whose events nobody ever wants keeps so many, the newest.
_MAX_EVENTS = 1000


class Unheard:
    """Holds such events, and asks with each topic's oldest, ever less often, whether somebody listens now.

    Args:
        send: Queues events to be sent again.
        forget: Drops the oldest one when there are too many.
    """

    def __init__(self, send: Callable[[list[Stored]], None], forget: Callable[[int], None]) -> None:
        self._send = send
        self._forget = forget
        self._events: dict[int, Stored] = {}
        self._pause_s = _FIRST_PAUSE_S
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stored: Stored) -> None:
        """Nobody has heard this one."""
        if not self._events:
            log.warning("mqtt.nobody_listens topic=%s", stored.message.topic)
        self._events[stored.key] = stored
        if len(self._events) > _MAX_EVENTS:
            oldest = next(iter(self._events))
            del self._events[oldest]
            self._forget(oldest)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._ask)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def heard(self, stored: Stored) -> None:
        """Somebody listens to this topic: whoever hears one of its events shall have the others."""
        topic = stored.message.topic
        events = [event for event in self._events.values() if event.message.topic == topic]
        for event in events:
            del self._events[event.key]
        others = [event for event in events if event.key != stored.key]
        if not self._events:
            self._pause_s = _FIRST_PAUSE_S
            self._stop()
        if others:
            self._send(others)

    def clear(self) -> None:
        """Another connection begins with everything anyway, or there is none any more."""
        self._events.clear()
        self._pause_s = _FIRST_PAUSE_S
        self._stop()

    def _ask(self) -> None:
        self._timer = None
        oldest: dict[str, Stored] = {}
        for event in self._events.values():
            oldest.setdefault(event.message.topic, event)
        if oldest:
            self._send([*oldest.values()])

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
