"""The command that measures a device under load."""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from edgellm.cli.output import DeviceOption, JsonOption, print_facts, print_json, print_table

if TYPE_CHECKING:
    from edgellm.bench.session import Findings, Progress, Settings

_Number = TypeVar("_Number", int, float)


class ScenarioName(str, Enum):
    """As in `edgellm.bench.session`, which would make `edgellm --help` slow."""

    SWEEP = "sweep"
    CHAT = "chat"
    INTERFERENCE = "interference"


def bench(
    device: DeviceOption,
    scenario: Annotated[
        ScenarioName,
        typer.Option(
            help="sweep: lengths and loads; chat: conversations of several turns; interference: a prompt of "
            "--input-tokens comes in while --concurrency answers of --output-tokens run."
        ),
    ] = ScenarioName.SWEEP,
    model: Annotated[str, typer.Option(help="Name or digest of the engine; default: the active one.")] = "",
    input_tokens: Annotated[str, typer.Option(help="Prompt lengths, for example 128,512.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="Answer lengths.")] = "128",
    concurrency: Annotated[
        str, typer.Option(help="Users who each wait for their answer, for example 1,4,8.")
    ] = "1,4",
    rate: Annotated[
        str, typer.Option(help="Requests per second at random moments, in place of --concurrency.")
    ] = "",
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests, conversations or rounds for each load; default: by the load."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="No request starts after so many seconds of a load.")
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before each load of a sweep, not counted.")
    ] = 2,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens at the start that all prompts share; else none are alike.")
    ] = 0,
    turns: Annotated[int, typer.Option(min=1, max=100, help="Turns of a conversation.")] = 4,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeats the prompts, which may then be cached on the device.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Deadline of each request, seconds.")] = 600.0,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with plots here (needs edgellm[bench]).")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure how fast a device answers: throughput, latencies, tokens per joule.

    \b
    edgellm bench --device jetson-01 --input-tokens 128,512 --concurrency 1,4,8 --report bench.html
    edgellm bench --device jetson-01 --rate 0.5,1,2 --duration 60
    edgellm bench --device jetson-01 --scenario interference --input-tokens 1024 --output-tokens 512
    """
    from edgellm.bench.session import Scenario, Settings
    from edgellm.bench.tables import document

    settings = Settings(
        device=device,
        scenario=Scenario(scenario.value),
        model=model,
        input_tokens=_numbers(input_tokens, "--input-tokens", int),
        output_tokens=_numbers(output_tokens, "--output-tokens", int),
        concurrency=_numbers(concurrency, "--concurrency", int),
        rates=_numbers(rate, "--rate", float) if rate else (),
        requests=requests,
        duration_s=duration,
        warmup=warmup,
        shared_prefix_tokens=shared_prefix,
        turns=turns,
        seed=seed,
        timeout_s=timeout,
    )
    _check_usage(settings, report)
    with _bar(settings, shown=not json_) as progress:
        findings = asyncio.run(_run(settings, progress))
    if findings.rows:
        if json_:
            print_json(document(findings))
        else:
            _print_text(findings)
        _write_report(findings, report)
    if findings.failure is not None:
        raise findings.failure
    if findings.stopped:
        raise typer.Exit(130)


def _numbers(text: str, option: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < 1_000_000 for number in numbers):
        raise typer.BadParameter(f"{text!r:.80}: write numbers above 0, as in 1,4,8", param_hint=option)
    return numbers


def _check_usage(settings: Settings, report: Path | None) -> None:
    """Refuses what does not go together, before anything is measured."""
    from edgellm.bench import plots
    from edgellm.bench.session import Scenario

    plain = settings.scenario is Scenario.SWEEP
    for option, used in (
        ("--rate", settings.rates),
        ("--duration", settings.duration_s),
        ("--shared-prefix", settings.shared_prefix_tokens),
        ("--report", report),
    ):
        if used and not plain:
            raise typer.BadParameter("goes with --scenario sweep only", param_hint=option)
    if settings.shared_prefix_tokens > min(settings.input_tokens):
        raise typer.BadParameter("is longer than --input-tokens", param_hint="--shared-prefix")
    if report is not None:
        if not report.parent.is_dir():
            raise typer.BadParameter(f"{report.parent} is no directory", param_hint="--report")
        plots.check_available()


async def _run(settings: Settings, progress: Progress) -> Findings:
    """Measures until the end or the first Ctrl-C; a second one ends the program at once."""
    from edgellm.bench import session

    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    # Not to be had on Windows, nor outside the main thread: there, Ctrl-C ends the program at once.
    with suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, interrupted)
    return await session.run(settings, stop, progress)


@contextmanager
def _bar(settings: Settings, *, shown: bool) -> Iterator[Progress]:
    """A bar of requests done, on a terminal only."""
    from edgellm.bench.session import Progress

    if not (shown and sys.stderr.isatty()):
        yield Progress()
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("getting ready", total=settings.requests_in_all())
        yield Progress(
            on_point=lambda point: bar.update(task, description=str(point)),
            on_record=lambda: bar.advance(task),
        )


def _print_text(findings: Findings) -> None:
    from edgellm.bench import tables

    if findings.system is not None:
        print_facts(tables.facts(findings.system))
    for headers, rows in tables.tables(findings.rows):
        typer.echo()
        print_table(headers, rows)
    typer.echo(f"\n{textwrap.fill(tables.NOTE, 110)}\n\nto measure this again:")
    for row in findings.rows:
        typer.echo(f"  {findings.settings.command(row.point)}")


def _write_report(findings: Findings, path: Path | None) -> None:
    from edgellm import paths
    from edgellm.bench import report
    from edgellm.bench.sweep import Row

    if path is None or findings.system is None:
        return
    rows = [row for row in findings.rows if isinstance(row, Row)]
    commands = [findings.settings.command(row.point) for row in rows]
    paths.write_atomically(path, report.html(findings.system, rows, commands).encode())
