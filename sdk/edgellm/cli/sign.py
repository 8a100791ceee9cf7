"""Commands about signatures on a bundle: sign, verify."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import passphrase as phrases
from edgellm.cli.bundle import BundleArgument, open_bundle
from edgellm.cli.output import JsonOption, print_facts, print_json, print_table, progress
from edgellm.cli.passphrase import PassphraseOption

if TYPE_CHECKING:
    from edgellm.bundle import Variant
    from edgellm.signing import PublicKey, Release, Verdict
    from edgellm.signing.attesting import SignedReport
    from edgellm.signing.ed25519 import SigningKey

_UNITS_S = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def sign(
    key: Annotated[str, typer.Option("--key", help="A .key file, or the name of a key made here.")],
    release: Annotated[
        int, typer.Option("--release", min=1, help="Number of this release; grows with each of the name.")
    ],
    bundle: BundleArgument = None,
    expires: Annotated[str, typer.Option(help="How long it may be activated: 365d, 12h, 8w.")] = "365d",
    profile: Annotated[
        list[str] | None,
        typer.Option(help="For this kind of board only; may be repeated.", show_default=False),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Digest of the one engine to sign; default: all.", show_default=False)
    ] = None,
    passphrase_env: PassphraseOption = None,
    json_: JsonOption = False,
) -> None:
    """Sign the engines of a bundle as a release, and with it what the build host said about them.

    The engines and their digests stay as they are. What the same key had signed about an engine before is
    replaced.

    \b
    edgellm sign smollm2.bundle --key release-2026 --release 7
    edgellm sign smollm2.bundle --key ./ci.key --release 8 --expires 90d --profile orin-nano-8gb
    """
    from edgellm.signing.attesting import attest_release

    opened = open_bundle(bundle)
    signing = _signing_key(key, passphrase_env)
    valid_s, now_s = _duration_s(expires), int(time.time())
    chosen = opened.variants if variant is None else (opened.variant(variant),)
    with progress("verify", shown=not json_) as on_progress:
        opened.verify(on_progress)
    signed = []
    for item in chosen:
        opened, said = attest_release(
            opened, item, signing, release, issued_s=now_s, expires_s=now_s + valid_s, profiles=profile or ()
        )
        signed.append((item, said))
    if json_:
        print_json({"key_id": signing.key_id, "engines": [_signed_json(*each) for each in signed]})
        return
    for item, said in signed:
        print_facts(
            [
                ("engine", item.config.name),
                ("digest", item.digest),
                *_release_facts(said),
                ("key id", signing.key_id),
            ]
        )


def verify(
    key: Annotated[
        list[str], typer.Option("--key", help="A .pub.json or PEM file to trust; may be repeated.")
    ],
    bundle: BundleArgument = None,
    profile: Annotated[
        str | None, typer.Option(help="As a board of this kind would.", show_default=False)
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Check every digest of a bundle, and that one of the keys stands for each engine now.

    What only a device knows, as keys that were revoked there and the releases that it had, is not checked.

    \b
    edgellm verify smollm2.bundle --key release-2026.pub.json --profile orin-nano-8gb
    """
    from edgellm.signing import Expected, Keyring, judge, keys
    from edgellm.signing.attesting import signed_reports

    opened = open_bundle(bundle)
    trusted = Keyring(tuple(keys.read_public_key(keys.find(name, keys.PUBLIC_SUFFIX)) for name in key))
    with progress("verify", shown=not json_) as on_progress:
        opened.verify(on_progress)
    now_s = time.time()
    verdicts = [
        (
            item,
            judge(
                opened.attestations(item.digest),
                trusted,
                Expected(item.digest, item.config.name, profile, now_s),
            ),
        )
        for item in opened.variants
    ]
    reports = [
        signed_reports(opened.attestations(item.digest), trusted.trusted, item.digest) for item, _ in verdicts
    ]
    if json_:
        engines = [_verdict_json(*each, found) for each, found in zip(verdicts, reports, strict=True)]
        print_json({"bundle": opened.path, "engines": engines})
    else:
        print_table(
            ("ENGINE", "RELEASE", "EXPIRES", "SIGNED BY", "PERPLEXITY", "DIGEST"),
            [_row(*each, found) for each, found in zip(verdicts, reports, strict=True)],
        )
    if not all(verdict.standing for _, verdict in verdicts):
        _refuse(verdicts, trusted.trusted)


def _refuse(verdicts: list[tuple[Variant, Verdict]], trusted: tuple[PublicKey, ...]) -> None:
    from edgellm.signing import SigningError

    item, verdict = next(each for each in verdicts if not each[1].standing)
    names = ", ".join(key.name for key in trusted)
    raise SigningError(
        f"{item.config.name} is not trusted: {'; '.join(verdict.reasons)}",
        f"trusted here: {names}; sign it with `edgellm sign`",
    )


def _signing_key(key: str, variable: str | None) -> SigningKey:
    from edgellm.signing import SigningError, keys

    path = keys.find(key, keys.PRIVATE_SUFFIX)
    if not keys.is_encrypted(path):
        return keys.read_signing_key(path)
    passphrase = phrases.known(variable, str(path))
    if passphrase is None:
        raise SigningError(f"{path} needs a passphrase", "name a variable that has it with --passphrase-env")
    return keys.read_signing_key(path, passphrase().encode())


def _duration_s(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time like 365d, 12h or 8w", param_hint="--expires")
    return int(match[1]) * _UNITS_S[match[2]]


def _release_facts(release: Release) -> list[tuple[str, str]]:
    from edgellm.signing import times

    return [
        ("release", str(release.release)),
        ("expires", times.to_text(release.expires)),
        ("boards", ", ".join(release.profiles) or "any"),
    ]


def _signed_json(variant: Variant, release: Release) -> dict[str, object]:
    return {"digest": variant.digest, **release.model_dump(mode="json")}


def _verdict_json(variant: Variant, verdict: Verdict, reports: list[SignedReport]) -> dict[str, object]:
    standing = [
        {"key": item.key.name, "key_id": item.key.key_id, **item.release.model_dump(mode="json")}
        for item in verdict.standing
    ]
    quality = [{"keys": [key.name for key in item.keys], **item.report.to_json()} for item in reports]
    return {
        "digest": variant.digest,
        "standing": standing,
        "reasons": verdict.reasons,
        "quality": quality,
    }


def _row(variant: Variant, verdict: Verdict, reports: list[SignedReport]) -> tuple[str, ...]:
    from edgellm.signing import times

    # Of several, the worst: an older report may have been kept beside a newer one.
    worst = max((item.report.perplexity_increase for item in reports), default=None)
    perplexity = "-" if worst is None else f"{100 * worst:+.3g} %"
    if not verdict.standing:
        return variant.config.name, "-", "-", "nobody", perplexity, variant.digest
    best = max((item.release for item in verdict.standing), key=lambda release: release.release)
    names = ", ".join(dict.fromkeys(item.key.name for item in verdict.standing))
    release = str(best.release)
    return variant.config.name, release, times.day(best.expires), names, perplexity, variant.digest
