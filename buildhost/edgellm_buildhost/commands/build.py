"""`edgellm build`: from a checkpoint to a bundle."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm import paths
from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json
from edgellm.profiles import load_profile
from edgellm_buildhost.commands.options import (
    BudgetOption,
    CalibrationOption,
    GridOption,
    GroupSizeOption,
    QuantOfFloatsOption,
    SourceArgument,
    bars,
)
from edgellm_buildhost.recipe import GridName, KvName, QuantName, Request

if TYPE_CHECKING:
    from edgellm.bundle import EngineConfig
    from edgellm.bundle.quality import QualityReport
    from edgellm_buildhost.job import Job

app = typer.Typer(add_completion=False, rich_markup_mode=None)

ProfileOption = Annotated[
    str,
    typer.Option("--profile", "--device", help="Kind of board that it is for, as orin-nano-8gb; or host."),
]
KvOption = Annotated[
    KvName,
    typer.Option(
        "--kv",
        help="KV cache. int8: a quarter of the memory; the device needs ONNX Runtime 1.32 or newer.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Directory of the bundle; default: below edgellm's data directory.",
        show_default=False,
    ),
]
NameOption = Annotated[
    str | None, typer.Option(help="Name of the engine; default: from the checkpoint.", show_default=False)
]
ReportOption = Annotated[
    bool | None,
    typer.Option(
        "--report/--no-report",
        help="Measure the engine against the float model, and attach it; default: with calibrated methods.",
        show_default=False,
    ),
]
HeldOutOption = Annotated[
    Path | None,
    typer.Option(
        "--held-out",
        help="Text of the report; default: the part of Python's reference that calibration leaves out.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-increase",
        min=0.0,
        help="Fail if perplexity grows by more than this part, as 0.05.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Tokens that have to fit on the board.", show_default=False),
]
ConcurrencyOption = Annotated[
    int, typer.Option("--concurrency", min=1, help="Sequences that have to fit at once.")
]


@dataclass(frozen=True)
class Built:
    """What a build made."""

    target: Path
    digest: str
    size_bytes: int
    config: EngineConfig
    report: QualityReport | None


@app.callback()
def _group() -> None:
    """Keeps `build` a command of its own."""


@app.command()
def build(
    source: SourceArgument,
    quant: QuantOfFloatsOption = None,
    kv: KvOption = KvName.FLOAT32,
    profile: ProfileOption = "host",
    output: OutputOption = None,
    name: NameOption = None,
    group_size: GroupSizeOption = None,
    grid: GridOption = None,
    budget_bytes: BudgetOption = None,
    calibration: CalibrationOption = None,
    report: ReportOption = None,
    held_out: HeldOutOption = None,
    max_perplexity_increase: LimitOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = 1,
    canary: Annotated[
        bool, typer.Option(help="Record what the engine answers, for devices to compare with.")
    ] = True,
    json_: JsonOption = False,
) -> None:
    """Quantize a checkpoint and write it as an engine bundle.

    The source is read one layer at a time. In the end the engine is loaded and answers once, which takes the
    memory of its weights; with --no-canary and without a report, a model larger than memory can be built.
    Equal input gives equal digests on one machine. An interrupted build goes on where it was when the same
    command is given again, and leaves no half bundle. What the engine was made from, and with, is attached to
    it: `edgellm inspect` shows it, `edgellm sign` has a key stand for it.

    \b
    edgellm build ./SmolLM2-135M-Instruct --quant int4-gptq --profile orin-nano-8gb
    edgellm build model.gguf --quant int8 -o model.bundle
    edgellm build ./model --quant int4-gptq --calibration chats.jsonl --max-perplexity-increase 0.05
    edgellm build ./model --quant auto --budget-bytes 900000000
    """
    from edgellm_buildhost.job import Job

    load_profile(profile)
    job = Job(
        source=source,
        request=_request(quant, group_size, grid, budget_bytes),
        kv=kv,
        profile=profile,
        name=name,
        calibration=calibration,
        report=report,
        held_out=held_out,
        max_perplexity_increase=max_perplexity_increase,
        context=context,
        concurrency=concurrency,
        canary=canary,
    )
    built = _make(job, output, shown=not json_)
    paths.record_last_build(built.target)
    _show(built, as_json=json_)


def _request(
    quant: QuantName | None, group_size: int | None, grid: GridName | None, budget_bytes: int | None
) -> Request | None:
    """What was asked to be done to the weights; None if nothing was."""
    if (quant, group_size, grid, budget_bytes) == (None, None, None, None):
        return None
    return Request(quant or QuantName.INT4, group_size, grid, budget_bytes)


def _make(job: Job, output: Path | None, *, shown: bool) -> Built:
    from edgellm.bundle import Bundle, BundleWriter
    from edgellm_buildhost.job import naming_full_disk

    began_s = time.time()
    prepared = job.prepare()
    target = output or paths.data_dir() / "bundles" / f"{prepared.name}-{job.profile}.bundle"
    with (
        naming_full_disk(target.parent),
        BundleWriter(target) as writer,
        tempfile.TemporaryDirectory(prefix=f".{target.name}.files.", dir=target.parent) as files,
        bars(shown=shown) as progress,
    ):
        config, report = prepared.run(Path(files), progress)
        digest = writer.add(Path(files), config)
        for envelope in prepared.said(digest, report, began_s):
            writer.attest(digest, envelope)
    size_bytes = Bundle.open(target).select(profile=job.profile).manifest.size_bytes
    return Built(target, digest, size_bytes, config, report)


def _show(built: Built, *, as_json: bool) -> None:
    config, report = built.config, built.report
    if as_json:
        facts = {"bundle": built.target, "digest": built.digest, "size_bytes": built.size_bytes}
        quality = None if report is None else report.model_dump(mode="json")
        print_json({**facts, "config": config.model_dump(mode="json"), "quality": quality})
        return
    precision = config.precision
    groups = "" if precision.group_size is None else f", groups of {precision.group_size}"
    facts_for_people = [
        ("bundle", str(built.target)),
        ("engine", config.name),
        ("digest", built.digest),
        ("weights", f"{precision.weights}{groups}, {precision.scheme}"),
        ("head", precision.head),
        ("KV cache", f"{precision.kv}, {human_bytes(config.kv_bytes_per_token)} per token"),
        ("size", human_bytes(built.size_bytes)),
        *_quality(built.report),
    ]
    print_facts([*facts_for_people, ("next", "edgellm push engine --device NAME")])


def _quality(report: QualityReport | None) -> list[tuple[str, str]]:
    """In a line; `edgellm inspect` has the rest."""
    if report is None:
        return []
    increase, same = 100 * report.perplexity_increase, 100 * report.top1_agreement
    words = f"perplexity {increase:+.3g} %, KL {report.kl_divergence:.3g}, top-1 {same:.3g} % the same"
    return [("quality", f"{words}, on {report.tokens:,} tokens")]
