"""Who forbids, for now, that a running engine is taken away: a robot that docks, a dialogue that goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from edgellm_agent.errors import BusyError, HeldError

_MOST = 64
_LONGEST_REASON = 100


class Holds:
    """The holds in force; each lasts as long as its context, and so no longer than its program."""

    def __init__(self) -> None:
        self._holders: dict[int, str] = {}
        self._count = 0
        self._ended = asyncio.Event()

    async def ended(self) -> None:
        """Returns when the agent is about to end, and no hold matters any more."""
        await self._ended.wait()

    def end(self) -> None:
        """The agent is about to end."""
        self._ended.set()

    @contextmanager
    def held(self, who: str, reason: str) -> Iterator[None]:
        """Holds the engines; raises BusyError where too many do."""
        if len(self._holders) >= _MOST:
            raise BusyError(f"{_MOST} programs hold the engines already")
        self._count += 1
        key = self._count
        self._holders[key] = f"{who or 'a program'} ({reason[:_LONGEST_REASON] or 'no reason given'})"
        try:
            yield
        finally:
            del self._holders[key]

    def check(self, *, force: bool = False) -> None:
        """Raises HeldError, which names one holder, unless nobody holds or it does not matter."""
        if self._holders and not force:
            first, more = next(iter(self._holders.values())), len(self._holders) - 1
            others = f" and {more} more" if more else ""
            raise HeldError(f"the engines are held by {first}{others}; wait, or use force")
