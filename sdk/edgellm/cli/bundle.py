"""Commands about a bundle on this machine: what is in it, and which of its engines suits a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json, print_table, progress

if TYPE_CHECKING:
    from edgellm.bundle import Bundle, Variant
    from edgellm.bundle.quality import QualityReport
    from edgellm.client import DeviceInfo
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
                "quality": None if claim.quality is None else claim.quality.to_json(),
            }
            for claim in _said(bundle, variant)
        ],
    }


def _said(bundle: Bundle, variant: Variant) -> list[Claim]:
    """What is attached to an engine; no signature of it has been checked."""
    from edgellm.signing.attesting import said

    return [said(data, variant.digest) for data in bundle.attestations(variant.digest)]


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
    for claim in said:
        if claim.quality is not None:
            print_facts([*_quality_facts(claim.quality), ("signed by", _signers(claim))])
            typer.echo()
    rows = [
        (
            claim.kind,
            "" if claim.release is None else str(claim.release.release),
            "" if claim.release is None else day(claim.release.expires),
            _signers(claim),
        )
        for claim in said
    ]
    print_table(("ATTACHED", "RELEASE", "EXPIRES", "SIGNED BY (not checked: `edgellm verify`)"), rows)
    typer.echo()


def _signers(claim: Claim) -> str:
    return ", ".join(key_id[:12] for key_id in claim.key_ids) or "nobody"


def _quality_facts(report: QualityReport) -> list[tuple[str, str]]:
    """A quality report for people; three digits are more than a short text can tell."""
    reference = "the float model" if report.reference == "float" else "its own weights in float32"
    stderr, calibration = report.perplexity_increase_stderr, report.calibration
    increase = f"{100 * report.perplexity_increase:+.3g} %"
    if stderr is not None:
        increase += f" (standard error {100 * stderr:.2g} %)"
    facts = [
        ("quality", f"against {reference}"),
        ("perplexity", f"{report.perplexity:.4g}, reference {report.float_perplexity:.4g}: {increase}"),
        ("KL", f"{report.kl_divergence:.3g} nats a token, 99 % below {report.kl_divergence_p99:.3g}"),
        ("top-1", f"{100 * report.top1_agreement:.3g} % the same"),
        ("text", f"{report.tokens:,} tokens of {report.text.name} ({report.text.sha256[:12]})"),
    ]
    if calibration is not None:
        facts.append(("calibration", f"{calibration.method}, text {calibration.sha256[:12]}"))
    ran = f"{report.runtime.name} {report.runtime.version}, {report.seconds:.3g} s"
    return [*facts, ("measured", f"{report.windows:,} windows of {report.window_tokens:,} tokens, {ran}")]
