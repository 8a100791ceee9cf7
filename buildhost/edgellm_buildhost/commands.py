"""`edgellm build`: from a checkpoint to a bundle, on the command line."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm import paths
from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json
from edgellm.profiles import load_profile
from edgellm_buildhost.recipe import KvName, PrecisionName

if TYPE_CHECKING:
    from edgellm.bundle import EngineConfig
    from edgellm_buildhost.build import Progress

app = typer.Typer(add_completion=False, rich_markup_mode=None)

SourceArgument = Annotated[
    Path, typer.Argument(help="Hugging Face directory, or a .gguf file.", show_default=False)
]
ProfileOption = Annotated[
    str,
    typer.Option("--profile", "--device", help="Kind of board that it is for, as orin-nano-8gb; or host."),
]
PrecisionOption = Annotated[
    PrecisionName,
    typer.Option("--precision", help="int4: smallest. int8: closest to the checkpoint."),
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


@app.callback()
def _group() -> None:
    """Keeps `build` a command of its own."""


@app.command()
def build(
    source: SourceArgument,
    precision: PrecisionOption = PrecisionName.INT4,
    kv: KvOption = KvName.FLOAT32,
    profile: ProfileOption = "host",
    output: OutputOption = None,
    name: NameOption = None,
    canary: Annotated[
        bool, typer.Option(help="Record what the engine answers, for devices to compare with.")
    ] = True,
    json_: JsonOption = False,
) -> None:
    """Quantize a checkpoint and write it as an engine bundle.

    The source is read one tensor at a time. In the end the engine is loaded and answers once, which takes the
    memory of its weights; with --no-canary, a model larger than memory can be built. Equal input gives equal
    digests on one machine. Nothing is left behind when the build fails or is interrupted. What the engine was
    made from, and with, is attached to it: `edgellm inspect` shows it, `edgellm sign` has a key stand for it.

    \b
    edgellm build ./SmolLM2-135M-Instruct --profile orin-nano-8gb
    edgellm build model.gguf --precision int8 -o model.bundle
    """
    from edgellm.bundle import Bundle, BundleWriter
    from edgellm_buildhost import provenance
    from edgellm_buildhost.build import build_engine, suggested_name
    from edgellm_buildhost.checkpoint import open_checkpoint

    load_profile(profile)
    began_s = time.time()
    checkpoint = open_checkpoint(source)
    sources = provenance.Sources.read(source)
    engine_name = name or suggested_name(checkpoint, precision, kv)
    target = output or paths.data_dir() / "bundles" / f"{engine_name}-{profile}.bundle"
    with (
        BundleWriter(target) as writer,
        tempfile.TemporaryDirectory(prefix=f".{target.name}.files.", dir=target.parent) as files,
        _bars(shown=not json_) as progress,
    ):
        config = build_engine(
            checkpoint,
            precision,
            Path(files),
            profile=profile,
            kv=kv,
            name=engine_name,
            progress=progress,
            canary=canary,
        )
        digest = writer.add(Path(files), config)
        options = {"precision": precision.value, "kv": kv.value, "profile": profile, "name": engine_name}
        writer.attest(digest, provenance.envelope(engine_name, digest, sources, options, began_s))
    paths.record_last_build(target)
    size_bytes = Bundle.open(target).select(profile=profile).manifest.size_bytes
    _report(target, digest, size_bytes, config, as_json=json_)


@contextmanager
def _bars(*, shown: bool) -> Iterator[Progress]:
    """A bar for each stage: layers quantized, tokens of calibration; only if `shown`, on a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _stage, _done, _total: None
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
        tasks: dict[str, bars.TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance


def _report(target: Path, digest: str, size_bytes: int, config: EngineConfig, *, as_json: bool) -> None:
    if as_json:
        facts = {"bundle": target, "digest": digest, "size_bytes": size_bytes}
        print_json({**facts, "config": config.model_dump(mode="json")})
        return
    precision = config.precision
    print_facts(
        [
            ("bundle", str(target)),
            ("engine", config.name),
            ("digest", digest),
            ("weights", f"{precision.weights}, groups of {precision.group_size}, {precision.scheme}"),
            ("head", precision.head),
            ("KV cache", f"{precision.kv}, {human_bytes(config.kv_bytes_per_token)} per token"),
            ("size", human_bytes(size_bytes)),
            ("next", "edgellm push engine --device NAME"),
        ]
    )
