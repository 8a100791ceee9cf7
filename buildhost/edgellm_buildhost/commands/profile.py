"""`edgellm profile`: where the time of a step goes, on the command line."""

from __future__ import annotations

import os
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm import paths
from edgellm.cli.bundle import BundleArgument, open_bundle
from edgellm.cli.output import JsonOption, human_bytes, note, print_facts, print_json, print_table
from edgellm_buildhost.profiling.profile import By, Row

if TYPE_CHECKING:
    from edgellm_buildhost.profiling.engine import Step
    from edgellm_buildhost.profiling.measure import Profile

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Phase(str, Enum):
    """What a step does: reads prompts, or adds a token to each text."""

    DECODE = "decode"
    PREFILL = "prefill"


@app.callback()
def _group() -> None:
    """Keeps `profile` a command of its own."""


@app.command()
def profile(
    bundle: BundleArgument = None,
    phase: Annotated[
        Phase, typer.Option(help="decode: one token for each row. prefill: a piece of a prompt.")
    ] = Phase.DECODE,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Rows, that is sequences, in a step.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that each row has in its cache; default: 256 for decode, 0 for prefill.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a row in a prefill step.")] = 128,
    steps: Annotated[int, typer.Option(min=4, max=1000, help="Steps that are timed.")] = 32,
    threads: Annotated[int, typer.Option(min=0, max=256, help="CPU threads; 0: one per core.")] = 0,
    by: Annotated[By, typer.Option(help="What a row is: a kind of operator, a node, a layer.")] = By.OP,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it as bars into this SVG file.", show_default=False)
    ] = None,
    board: Annotated[
        str | None,
        typer.Option(
            "--profile",
            help="The engine for this kind of board, where there are several.",
            show_default=False,
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show where the time of a step goes, operator by operator, on this machine.

    The engine runs as a device's worker runs it. Rows add up to a step. For matrices, READ is what of the
    weights is read; GB/S beside the memory's own speed says how much faster they could get.

    \b
    edgellm profile smollm2.bundle --context 1024
    edgellm profile --phase prefill --prompt 128 --by layer --plot prefill.svg
    """
    from edgellm_buildhost.profiling import plots
    from edgellm_buildhost.profiling.measure import measure

    if plot is not None:
        # Before minutes of measuring.
        plots.check_available()
    opened = open_bundle(bundle)
    found = measure(
        opened,
        opened.select(profile=board),
        _step(phase, batch, context, prompt),
        threads=threads or len(os.sched_getaffinity(0)),
        steps=steps,
        progress=lambda text: note(f"measuring: {text}", shown=not json_),
    )
    rows = found.rows(by)
    if plot is not None:
        paths.write_atomically(plot, plots.bars(rows, _title(found, phase), found.memory_read_gb_s).encode())
    if json_:
        print_json(_as_json(found, phase, rows))
        return
    _print(found, phase, rows)


def _step(phase: Phase, batch: int, context: int | None, prompt: int) -> Step:
    from edgellm_buildhost.profiling.engine import Step

    if phase is Phase.DECODE:
        return Step(batch, 1, 256 if context is None else context)
    return Step(batch, prompt, context or 0)


def _title(found: Profile, phase: Phase) -> str:
    step = found.step
    return (
        f"{found.engine}, {phase.value}: {step.batch} x {step.tokens} tokens behind {step.context}, "
        f"{found.threads} threads, ONNX Runtime {found.onnxruntime}"
    )


def _as_json(found: Profile, phase: Phase, rows: list[Row]) -> dict[str, object]:
    facts = {name: value for name, value in asdict(found).items() if name != "nodes"}
    return {
        **facts,
        "phase": phase.value,
        "tokens_per_s": found.tokens_per_s,
        "rows": [{**asdict(row), "read_gb_s": row.read_gb_s, "gop_s": row.gop_s} for row in rows],
    }


def _print(found: Profile, phase: Phase, rows: list[Row]) -> None:
    headers = ("OPERATOR", "CALLS", "MS", "SHARE", "READ", "GB/S", "GOP/S")
    print_table(headers, [_cells(row) for row in rows])
    typer.echo()
    cost_ms = found.profiled_ms - found.step_ms
    busy = "; something else runs on this machine" if found.slowest_ms > 2 * found.fastest_ms else ""
    print_facts(
        [
            ("step", f"{found.step_ms:.2f} ms, {found.tokens_per_s:.1f} tokens/s"),
            ("steps", f"median of {found.steps}; {found.fastest_ms:.2f} to {found.slowest_ms:.2f} ms{busy}"),
            ("profiled", f"{found.profiled_ms:.2f} ms, {cost_ms:+.2f} ms ({cost_ms / found.step_ms:+.0%})"),
            ("memory", f"{found.memory_read_gb_s:.1f} GB/s read by {found.threads} threads"),
            ("of", _title(found, phase)),
            ("engine", found.digest),
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.calls),
        f"{row.time_ms:.3f}",
        f"{row.share:.1%}",
        human_bytes(row.read_bytes) if row.read_bytes else "",
        "" if row.read_gb_s is None else f"{row.read_gb_s:.1f}",
        "" if row.gop_s is None else f"{row.gop_s:.1f}",
    )
