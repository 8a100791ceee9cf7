"""What a push shows while it runs: on a terminal, a bar per device; elsewhere nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgellm.cli.output import human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from edgellm.client import PushProgress
    from edgellm.push import Watcher


@contextlib.contextmanager
def watching(devices: Sequence[str], *, shown: bool) -> Iterator[Watcher]:
    """Bars on standard error, gone at the end; only if `shown`, on a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield _Blind()
        return
    # Imported here: only a terminal pays for it.
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[figures]}", markup=False),
        bars.TextColumn("{task.fields[phase]}", markup=False),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress, devices)


class _Blind:
    """Shows nothing."""

    def phase(self, device: str, phase: str) -> None:
        """Nobody looks."""

    def progress(self, device: str, at: PushProgress) -> None:
        """Nobody looks."""


class _Bars:
    """A bar per device, with what it is at."""

    def __init__(self, progress: Progress, devices: Sequence[str]) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {
            device: progress.add_task(device, total=None, figures="", phase="waiting") for device in devices
        }

    def phase(self, device: str, phase: str) -> None:
        """Names what it is at."""
        self._progress.update(self._tasks[device], phase=phase)

    def progress(self, device: str, at: PushProgress) -> None:
        """Moves its bar."""
        self._progress.update(
            self._tasks[device], completed=at.done_bytes, total=at.total_bytes, figures=figures(at)
        )


def figures(at: PushProgress) -> str:
    """Bytes, rate and time left, as far as there is anything to tell."""
    words = [f"{human_bytes(at.done_bytes)} of {human_bytes(at.total_bytes)}"]
    if at.left_s is not None:
        words += [f"{human_bytes(round(at.bytes_per_s))}/s", f"{_duration(at.left_s)} left"]
    return ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
