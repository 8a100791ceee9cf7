"""What the commands have in common: their options, and the bars of long work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli import failures
from edgellm_buildhost.progress import Progress, silent
from edgellm_buildhost.recipe import GridName, QuantName

_INTERRUPTED = 130
_RESUME = "run the same command again: it goes on behind them"

SourceArgument = Annotated[
    Path,
    typer.Argument(
        help="Hugging Face directory (float, or quantized: AWQ, GPTQ, ModelOpt), or a .gguf file.",
        show_default=False,
    ),
]
_QUANT_HELP = (
    "int4: seconds, no calibration. int4-gptq, int4-awq: minutes, closer. int8: closest. "
    "int8-smoothquant: 8-bit inputs too. auto: closer grids and 8 bits where they matter, within "
    "--budget-bytes."
)
_QUANT_NAMES = ("--quant", "--precision")
QuantOption = Annotated[QuantName, typer.Option(*_QUANT_NAMES, help=_QUANT_HELP)]
QuantOfFloatsOption = Annotated[
    QuantName | None,
    typer.Option(
        *_QUANT_NAMES,
        help=f"{_QUANT_HELP} Default: int4; a source that is quantized already is built as it is.",
        show_default=False,
    ),
]
GroupSizeOption = Annotated[
    int | None,
    typer.Option(
        "--group-size", help="Weights that share a scale: 16 to 256; default: by method.", show_default=False
    ),
]
GridOption = Annotated[
    GridName | None,
    typer.Option(
        "--grid",
        help="Levels of a group. symmetric: every runtime. zero-point: closer. minimum: closest, slower.",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    int | None,
    typer.Option("--budget-bytes", min=1, help="For auto: most bytes of the weights.", show_default=False),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Text, or JSON lines with text or messages, like what the engine will read; "
        "default: a reference of English and code that comes with Python.",
        show_default=False,
    ),
]


@contextmanager
def bars(*, shown: bool) -> Iterator[Progress]:
    """A bar for each stage: layers quantized, tokens of calibration; only if `shown`, on a terminal.

    An interrupt ends the program with a word on how to go on; as JSON, unless `shown`.
    """
    try:
        with _bars(shown=shown) as progress:
            yield progress
    except KeyboardInterrupt:
        if shown:
            typer.echo(f"interrupted; layers that are done are kept\n  try: {_RESUME}", err=True)
        else:
            failures.report_json("Interrupted", {"hint": _RESUME})
        raise typer.Exit(_INTERRUPTED) from None


@contextmanager
def _bars(*, shown: bool) -> Iterator[Progress]:
    if not (shown and sys.stderr.isatty()):
        yield silent
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, progress.TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance
