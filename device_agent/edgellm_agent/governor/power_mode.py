"""Asks the privileged helper for another power mode. What fails here is logged and does no harm."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from edgellm_agent.governor.states import State

log = logging.getLogger(__name__)

# Switching stalls the board for a moment, and its heat follows in minutes.
_DWELL_S = 300.0
# The helper gives nvpmodel half a minute.
_DEADLINE_S = 40.0
_LONGEST_ANSWER_BYTES = 512


class PowerModeError(Exception):
    """The helper refused, or could not do it."""


async def ask_helper(socket: Path, mode: str, deadline_s: float = _DEADLINE_S) -> None:
    """Has the helper switch to a mode; raises PowerModeError."""
    try:
        answer = await asyncio.wait_for(_exchange(socket, mode), deadline_s)
    except asyncio.TimeoutError:
        raise PowerModeError(f"no answer within {deadline_s:.0f} s") from None
    except (OSError, ValueError) as error:
        raise PowerModeError(str(error) or type(error).__name__) from None
    if answer != "ok":
        raise PowerModeError(answer.removeprefix("error: ") or "the helper hung up")


async def _exchange(socket: Path, mode: str) -> str:
    reader, writer = await asyncio.open_unix_connection(socket, limit=_LONGEST_ANSWER_BYTES)
    try:
        writer.write(f"{mode}\n".encode())
        return (await reader.readline()).decode(errors="replace").strip()
    finally:
        writer.close()


class PowerModes:
    """Keeps the board in the mode that belongs to the governor's state; a state without one changes nothing.

    Args:
        modes: Mode by the state's name.
        switch: Does it; raises PowerModeError.
        clock: Monotonic seconds.

    """

    def __init__(
        self,
        modes: Mapping[str, str],
        switch: Callable[[str], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._modes = dict(modes)
        self._switch = switch
        self._clock = clock
        self._not_before = float("-inf")
        self._switching: asyncio.Task[None] | None = None

    def want(self, state: State, current: str) -> None:
        """Begins to switch if the mode should be another one, and the last try is long enough ago."""
        mode = self._modes.get(state.name)
        if mode is None or mode == current or self._clock() < self._not_before:
            return
        if self._switching is None or self._switching.done():
            self._not_before = self._clock() + _DWELL_S
            self._switching = asyncio.create_task(self._try(mode), name="power-mode")

    async def close(self) -> None:
        """Waits for nothing: the helper ends what it began."""
        if self._switching is not None:
            self._switching.cancel()
            await asyncio.gather(self._switching, return_exceptions=True)

    async def _try(self, mode: str) -> None:
        try:
            await self._switch(mode)
        except PowerModeError as error:
            log.warning("power_mode.failed mode=%s: %s", mode, error)
        except Exception:
            log.exception("power_mode.failed mode=%s", mode)
        else:
            log.info("power_mode.switched mode=%s", mode)
