"""Blocking calls off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(function: Callable[[], Result], undo: Callable[[Result], None] | None = None) -> Result:
    """Runs a blocking function to its end, also when the call is cancelled: no file is closed under it.

    A result that a cancelled call can no longer take goes to `undo`.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        if undo is not None and thread.exception() is None:
            undo(thread.result())
        raise
