"""Commands about a bundle on this machine: what is in it, and how it would use a device's memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json, print_table, progress

if TYPE_CHECKING:
    from edgellm.bundle import Bundle, EngineConfig, Variant
    from edgellm.client import DeviceInfo
    from edgellm.memory import MemoryPlan
    from edgellm.signing.attesting import Claim

BundleArgument = Annotated[
    Path | None, typer.Argument(help="Directory of the bundle; default: the last build.", show_default=False)
]


def open_bundle(path: Path | None) -> Bundle:
    """Opens the named bundle, or the last build; raises BundleError."""
    from edgellm import paths
    from edgellm.bundle import Bundle
    from edgellm.errors import BundleError

    chosen = path or paths.last_build()
    if chosen is None:
        raise BundleError("no bundle was named and none was built here", "name one, or run `edgellm build`")
    return Bundle.open(chosen)


def variant_for(bundle: Bundle, info: DeviceInfo) -> Variant:
    """The variant for a device; raises BundleError if there are several and none suits."""
    from edgellm.errors import BundleError

    runtimes = {runtime.name for runtime in info.runtimes}
    for variant in bundle.variants:
        if variant.config.target.profile == info.profile and variant.config.runtime in runtimes:
            return variant
    if len(bundle.variants) == 1:
        # The device knows better what it can run, and refuses before a byte is copied.
        return bundle.variants[0]
    there_is = "; ".join(str(variant) for variant in bundle.variants)
    raise BundleError(
        f"the bundle has no engine for {info.profile} with {', '.join(sorted(runtimes))}",
        f"it has: {there_is}; build one for the device",
    )


def inspect(bundle: BundleArgument = None, json_: JsonOption = False) -> None:
    """Show what is in a bundle, after checking every digest.

    \b
    edgellm inspect smollm2.bundle
    edgellm inspect --json | jq .engines[0].digest
    """
    opened = open_bundle(bundle)
    with progress("verify", shown=not json_) as on_progress:
        opened.verify(on_progress)
    if json_:
        print_json(
            {
                "bundle": opened.path,
                "verified": True,
                "engines": [_as_json(opened, item) for item in opened.variants],
            }
        )
        return
    for variant in opened.variants:
        _print_variant(variant)
        _print_attestations(opened, variant)
    typer.echo(f"{len(opened.variants)} engine(s) in {opened.path}: every digest matches")


def plan(
    bundle: BundleArgument = None,
    device: Annotated[str | None, typer.Option(help="Ask this device.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Plan for a board of this kind; default: the bundle's own profile.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Longest sequence, tokens.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Sequences at once.")] = None,
    json_: JsonOption = False,
) -> None:
    """Show how an engine would use a device's memory.

    \b
    edgellm plan smollm2.bundle --profile orin-nano-8gb --context 4096 --concurrency 4
    edgellm plan --device jetson-01
    """
    opened = open_bundle(bundle)
    if device is not None:
        if profile is not None:
            raise typer.BadParameter("give --device or --profile, not both")
        _refuse_profile_name(device)
        figures = _plan_on_device(opened, device, context, concurrency)
    else:
        variant = _for_profile(opened, profile)
        figures = _plan_for_profile(
            variant.config, profile or variant.config.target.profile, context, concurrency
        )
    if json_:
        print_json(figures)
    else:
        print_facts(plan_facts(figures))


def _refuse_profile_name(device: str) -> None:
    from edgellm.devices import DeviceBook
    from edgellm.profiles import profile_names

    if device in profile_names() and device not in {known.name for known in DeviceBook().all()}:
        raise typer.BadParameter(f"{device} is a kind of board, not a device: give it as --profile")


def plan_facts(figures: MemoryPlan) -> list[tuple[str, str]]:
    """A memory plan for people."""
    return [
        ("available", human_bytes(figures.available_bytes)),
        ("weights", human_bytes(figures.weights_bytes)),
        ("workspace", human_bytes(figures.workspace_bytes)),
        ("headroom", human_bytes(figures.headroom_bytes)),
        (
            "KV cache",
            f"{human_bytes(figures.kv_bytes)} ({human_bytes(figures.kv_bytes_per_token)} per token)",
        ),
        ("context", f"{figures.context_tokens} tokens"),
        ("sequences", f"{figures.max_sequences} at once"),
    ]


def _for_profile(bundle: Bundle, profile: str | None) -> Variant:
    """The variant for a profile, or the only one: a plan may ask what would be on another board."""
    return bundle.variants[0] if len(bundle.variants) == 1 else bundle.select(profile=profile)


def _plan_for_profile(
    config: EngineConfig, name: str, context: int | None, concurrency: int | None
) -> MemoryPlan:
    from edgellm.memory import mem_available_bytes, plan_memory
    from edgellm.profiles import load_profile

    profile = load_profile(name)
    return plan_memory(
        config,
        available_bytes=profile.usable_bytes or mem_available_bytes(),
        headroom_bytes=profile.headroom_bytes,
        context_tokens=context,
        max_sequences=concurrency or 1,
    )


def _plan_on_device(bundle: Bundle, name: str, context: int | None, concurrency: int | None) -> MemoryPlan:
    from edgellm.client import Client
    from edgellm.memory import plan_memory

    with Client.for_device(name) as client:
        config = variant_for(bundle, client.info()).config
        figures = client.memory_plan(config)
    if context is None and concurrency is None:
        return figures
    return plan_memory(
        config,
        available_bytes=figures.available_bytes,
        headroom_bytes=figures.headroom_bytes,
        context_tokens=context,
        max_sequences=concurrency or figures.max_sequences,
    )


def _as_json(bundle: Bundle, variant: Variant) -> dict[str, object]:
    return {
        "digest": variant.digest,
        "size_bytes": variant.manifest.size_bytes,
        "config": variant.config.model_dump(mode="json"),
        "files": list(variant.manifest.layers),
        "attestations": [
            {
                "kind": claim.kind,
                "key_ids": claim.key_ids,
                "release": None if claim.release is None else claim.release.model_dump(mode="json"),
            }
            for claim in _said(bundle, variant)
        ],
    }


def _said(bundle: Bundle, variant: Variant) -> list[Claim]:
    """What is attached to an engine; nothing of it has been checked."""
    from edgellm.signing.attesting import said

    return [said(data) for data in bundle.attestations(variant.digest)]


def _print_variant(variant: Variant) -> None:
    config, model, precision = variant.config, variant.config.model, variant.config.precision
    print_facts(
        [
            ("engine", config.name),
            ("digest", variant.digest),
            ("runtime", f"{config.runtime} {config.runtime_requires}"),
            ("target", f"{config.target.profile}, {config.target.sm or config.target.architecture}"),
            ("model", f"{model.architecture}, {model.layers} layers, {model.context_length} tokens"),
            ("weights", f"{precision.weights}, groups of {precision.group_size}, {precision.scheme}"),
            ("embedding", precision.embedding),
            ("head", precision.head),
            ("activations", precision.activations),
            ("KV cache", f"{precision.kv}, {human_bytes(config.kv_bytes_per_token)} per token"),
            ("size", human_bytes(variant.manifest.size_bytes)),
        ]
    )
    typer.echo()
    rows = [(layer.title, human_bytes(layer.size_bytes), layer.digest) for layer in variant.manifest.layers]
    print_table(("FILE", "SIZE", "DIGEST"), rows)
    typer.echo()


def _print_attestations(bundle: Bundle, variant: Variant) -> None:
    from edgellm.signing.times import day

    said = _said(bundle, variant)
    if not said:
        return
    rows = [
        (
            claim.kind,
            "" if claim.release is None else str(claim.release.release),
            "" if claim.release is None else day(claim.release.expires),
            ", ".join(key_id[:12] for key_id in claim.key_ids) or "nobody",
        )
        for claim in said
    ]
    print_table(("ATTACHED", "RELEASE", "EXPIRES", "SIGNED BY (not checked: `edgellm verify`)"), rows)
    typer.echo()
