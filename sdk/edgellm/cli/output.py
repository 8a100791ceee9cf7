"""What commands print: aligned facts for people, JSON for programs, progress on a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Name of a known device, or its address.")]
IntervalOption = Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between records.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Deadline, seconds.")]


def print_json(value: object) -> None:
    """Prints one value as one line of JSON; dataclasses become objects."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=False))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Prints one fact a line, values aligned."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        typer.echo(f"{name:<{width}}  {printable(value)}".rstrip())


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints aligned columns without any frame, so that lines can be copied and piped."""
    lines = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        typer.secho(text, bold=number == 0)


def print_stream(text: str) -> None:
    """Prints a piece of an answer at once; a terminal gets no control characters from a model."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
    sys.stdout.flush()


def printable(text: str) -> str:
    """The text without characters that command a terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def short_digest(digest: str) -> str:
    """Enough of a digest to tell engines apart by eye."""
    return digest.removeprefix("sha256:")[:12]


def human_bytes(count: int) -> str:
    """A size that is read at a glance, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


@contextmanager
def progress(title: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, fed with bytes done and bytes in all; only if `shown`, on a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _done, _total: None
        return
    # Imported here: only a terminal pays for it.
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn(title),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def note(text: str, *, shown: bool) -> None:
    """Says on a terminal what goes on."""
    if shown and sys.stderr.isatty():
        typer.secho(text, err=True, dim=True)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
