"""Commands that take an engine out of its bundle for other programs: files, a Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.bundle import open_bundle
from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json, progress

if TYPE_CHECKING:
    from edgellm.bundle import Bundle, Variant

app = typer.Typer(
    help="Take an engine out of its bundle for other programs.", no_args_is_help=True, rich_markup_mode=None
)

# One list: what is optional comes first here, as in `cp`, and no parser of positions takes that.
PathsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="[BUNDLE] OUT",
        help="Directory of the bundle, default: the last build; and the directory to write.",
        show_default=False,
    ),
]
VariantOption = Annotated[
    str | None, typer.Option(help="Digest of the engine, where there are several.", show_default=False)
]
ProfileOption = Annotated[
    str | None, typer.Option(help="The engine for this kind of board.", show_default=False)
]


@app.command("dir")
def directory(
    paths: PathsArgument,
    variant: VariantOption = None,
    profile: ProfileOption = None,
    json_: JsonOption = False,
) -> None:
    """Unpack an engine's files under their names, with its config and manifest.

    Every digest is checked on the way. The directory appears as a whole or not at all; one that has something
    in it is refused.

    \b
    edgellm export dir smollm2.bundle ./smollm2
    edgellm export dir ./smollm2 --profile orin-nano-8gb
    """
    from edgellm.export import export_directory

    bundle, target = _bundle_and_target(paths)
    chosen = _chosen(bundle, variant, profile)
    with progress("export", shown=not json_) as on_progress:
        export_directory(bundle, chosen, target, on_progress)
    if json_:
        files = [layer.title for layer in chosen.manifest.layers]
        print_json({"path": target, "digest": chosen.digest, "engine": chosen.config.name, "files": files})
        return
    print_facts([("directory", str(target)), *_facts(chosen)])


@app.command()
def triton(
    paths: PathsArgument,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; default: the engine's.", show_default=False)
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="Default: the one after the last.", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences computed at once.")] = 4,
    preferred_batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch that is sent without waiting; may be repeated.", show_default=False),
    ] = None,
    queue_delay_us: Annotated[
        int, typer.Option(help="How long a request may wait for others to join it.")
    ] = 0,
    queue_size: Annotated[int, typer.Option(help="Requests that may wait; more are refused.")] = 64,
    instances: Annotated[int, typer.Option(help="Copies of the engine in memory.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of an instance; 0: one per core.")] = 0,
    context: Annotated[int, typer.Option(help="Longest prompt and answer together, tokens.")] = 2048,
    keep_config: Annotated[
        bool, typer.Option("--keep-config", help="Leave another config.pbtxt that is there as it is.")
    ] = False,
    variant: VariantOption = None,
    profile: ProfileOption = None,
    json_: JsonOption = False,
) -> None:
    """Write an engine into a Triton model repository, as a new version of a model that streams tokens.

    The version has all that it needs: model.py for Triton's Python backend, and the engine. Triton's Python
    needs onnxruntime and tokenizers (requirements.txt). The prompt is taken as it is: no chat template.

    \b
    edgellm export triton smollm2.bundle ./models --max-batch 8
    tritonserver --model-repository ./models
    """
    from edgellm.export import ServingOptions, export_triton

    options = ServingOptions(
        max_batch=max_batch,
        preferred_batches=tuple(preferred_batch or ()),
        queue_delay_us=queue_delay_us,
        queue_size=queue_size,
        instances=instances,
        threads=threads,
        context_tokens=context,
    )
    bundle, target = _bundle_and_target(paths)
    chosen = _chosen(bundle, variant, profile)
    with progress("export", shown=not json_) as on_progress:
        written = export_triton(
            bundle,
            chosen,
            target,
            options,
            model=name,
            version=version,
            keep_config=keep_config,
            on_progress=on_progress,
        )
    if json_:
        print_json(written)
        return
    tokens = max_batch * min(context, chosen.config.model.context_length)
    kv_bytes = tokens * chosen.config.kv_bytes_per_token
    print_facts(
        [
            ("model", f"{written.model}, version {written.version}"),
            ("path", str(written.path)),
            *_facts(chosen),
            ("KV cache", f"up to {human_bytes(kv_bytes)} for each of {instances} instance(s)"),
            ("needs", f"pip install -r {written.path / 'requirements.txt'}"),
            ("serve", f"tritonserver --model-repository {target}"),
        ]
    )


def _bundle_and_target(paths: list[Path]) -> tuple[Bundle, Path]:
    if len(paths) > 2:
        raise typer.BadParameter("give the bundle and the directory to write, no more")
    return open_bundle(paths[0] if len(paths) == 2 else None), paths[-1]


def _chosen(bundle: Bundle, digest: str | None, profile: str | None) -> Variant:
    """The engine that is meant; raises BundleError if that is not clear."""
    from edgellm.errors import BundleError

    if digest is not None and profile is not None:
        raise typer.BadParameter("give --variant or --profile, not both")
    if digest is not None:
        return bundle.variant(digest)
    if profile is not None or len(bundle.variants) == 1:
        return bundle.select(profile=profile)
    there_is = "; ".join(str(variant) for variant in bundle.variants)
    raise BundleError(
        f"the bundle has {len(bundle.variants)} engines: {there_is}", "say which one: --profile or --variant"
    )


def _facts(variant: Variant) -> list[tuple[str, str]]:
    return [
        ("engine", variant.config.name),
        ("digest", variant.digest),
        ("size", human_bytes(variant.manifest.size_bytes)),
    ]
