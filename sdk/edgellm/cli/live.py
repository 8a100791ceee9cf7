"""How a command shows what goes on until it is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_BARS = "▁▂▃▄▅▆▇█"


def quiet_grpc() -> None:
    """Keeps gRPC's own words about lost connections out of the picture; call it before gRPC is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def run_until_interrupted(main: Coroutine[Any, Any, None]) -> None:
    """Runs it to its end, or to Ctrl-C or SIGTERM, by which a view ends well: nothing is reported."""

    async def guarded() -> None:
        task, loop = asyncio.ensure_future(main), asyncio.get_running_loop()
        # Not to be had on Windows, nor outside the main thread.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(guarded())


async def show(
    console: Console, render: Callable[[int, int], RenderableType], tick_s: float, *, screen: bool
) -> None:
    """Draws `render(width, height)` again and again until it is cancelled, and at once in a new size.

    With `screen` the terminal is as it was before once this ends; without it, the last picture stays. A frame
    is written over the last one, and nothing is cleared in between: it does not flicker.
    """
    from rich.live import Live

    wake, loop = asyncio.Event(), asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError, AttributeError):
        loop.add_signal_handler(signal.SIGWINCH, wake.set)
    with _keys(wake), Live(console=console, auto_refresh=False, screen=screen) as live:
        while True:
            live.update(render(console.width, console.height), refresh=True)
            timer = loop.call_later(tick_s, wake.set)
            try:
                await wake.wait()
            finally:
                timer.cancel()
            wake.clear()


@contextlib.contextmanager
def _keys(wake: asyncio.Event) -> Iterator[None]:
    """Keys that are pressed are not shown in the picture: `q` ends it, others draw it anew."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield
        return
    try:
        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def pressed() -> None:
        keys = os.read(keyboard, 1024)
        if not keys:
            loop.remove_reader(keyboard)
        if b"q" in keys and task is not None:
            task.cancel()
        wake.set()

    try:
        tty.setcbreak(keyboard, termios.TCSANOW)
        loop.add_reader(keyboard, pressed)
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def sparkline(
    points: Sequence[tuple[float, float]], from_s: float, to_s: float, cells: int, low: float, high: float
) -> str:
    """Bars for the highest value in each of `cells` equal spans of time; a blank where there is none.

    Values at `low` and below are the smallest bar, those at `high` and above the largest.
    """
    highest: dict[int, float] = {}
    for at_s, value in points:
        cell = min(math.floor((at_s - from_s) / (to_s - from_s) * cells), cells - 1)
        if cell >= 0:
            highest[cell] = max(value, highest.get(cell, value))
    return bars([highest.get(cell) for cell in range(cells)], low, high)


def bars(values: Sequence[float | None], low: float, high: float) -> str:
    """A bar for each value, the smallest at `low`, the largest at `high`; a blank where there is none."""
    span = max(high - low, 1e-9)
    return "".join(" " if value is None else _bar((value - low) / span) for value in values)


def _bar(share: float) -> str:
    return _BARS[min(max(int(share * len(_BARS)), 0), len(_BARS) - 1)]
