"""How much one caller may take at once, so that there is something left for the others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.errors import BusyError, DeadlineError

Message = TypeVar("Message")

_RETRY_AFTER_S = 1.0
# What may come at once before the rate counts.
_BURST_S = 1.0
_MAX_PACED = 1024
_SILENCE_S = 60.0


class Limits:
    """Counts by the caller's name, not by connection: opening more of those does not help."""

    def __init__(self, settings: AccessSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._calls: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        # When what was sent so far will have come in at the rate that is allowed.
        self._due: OrderedDict[str, float] = OrderedDict()

    @contextlib.contextmanager
    def call(self, name: str, *, endless: bool) -> Iterator[None]:
        """Counts a call in for as long as the context lasts; raises BusyError."""
        counted = [(self._calls, self._settings.max_calls, "calls")]
        if endless:
            counted.append((self._streams, self._settings.max_streams, "open streams"))
        for counter, most, what in counted:
            if counter[name] >= most:
                raise BusyError(f"{name} has {most} {what} already", _RETRY_AFTER_S)
        for counter, _, _ in counted:
            counter[name] += 1
        try:
            yield
        finally:
            for counter, _, _ in counted:
                counter[name] -= 1
                if not counter[name]:
                    del counter[name]

    def paced(self, name: str, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages of an upload, no faster than the caller may send; flow control does the rest."""
        rate = self._settings.upload_bytes_per_s
        return messages if rate is None else self._paced(name, messages, rate)

    async def _paced(self, name: str, messages: AsyncIterator[Any], rate: int) -> AsyncGenerator[Any, None]:
        async for message in messages:
            pause_s = self._pause_s(name, message.ByteSize() / rate)
            if pause_s > 0:
                await asyncio.sleep(pause_s)
            yield message

    def _pause_s(self, name: str, cost_s: float) -> float:
        now = self._clock()
        due = max(self._due.get(name, now), now) + cost_s
        self._due[name] = due
        self._due.move_to_end(name)
        if len(self._due) > _MAX_PACED:
            self._due.popitem(last=False)
        return due - now - _BURST_S


async def until_silent(
    messages: AsyncIterator[Message], silence_s: float = _SILENCE_S
) -> AsyncGenerator[Message, None]:
    """The messages; raises DeadlineError when none comes for so long.

    A dead link must not keep a blob locked.
    """
    iterator = aiter(messages)
    while True:
        try:
            yield await asyncio.wait_for(anext(iterator), silence_s)
        except StopAsyncIteration:  # noqa: PERF203 - each message has its own deadline
            return
        except asyncio.TimeoutError:
            raise DeadlineError(f"nothing came for {silence_s:g} s; what came before is kept") from None
