"""Signs what is said about the engines of a bundle, and shows what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.bundle import Bundle, Variant
from edgellm.bundle.attach import attach
from edgellm.bundle.quality import QualityReport
from edgellm.errors import BundleError
from edgellm.signing import times
from edgellm.signing.dsse import PAYLOAD_TYPE, Envelope
from edgellm.signing.errors import SigningError
from edgellm.signing.keys import PublicKey
from edgellm.signing.statements import PROVENANCE_TYPE, QUALITY_TYPE, RELEASE_TYPE, Release, Statement

if TYPE_CHECKING:
    from edgellm.signing.ed25519 import SigningKey

_KINDS = {RELEASE_TYPE: "release", PROVENANCE_TYPE: "provenance", QUALITY_TYPE: "quality"}
# Enough to recognize the type of a stranger's predicate.
_KIND_CHARACTERS = 80


@dataclass(frozen=True)
class Claim:
    """An attestation by what it says itself; no signature of it has been checked."""

    kind: str
    key_ids: tuple[str, ...]
    release: Release | None = None
    quality: QualityReport | None = None


@dataclass(frozen=True)
class SignedReport:
    """A quality report, and those who stand for it."""

    report: QualityReport
    keys: tuple[PublicKey, ...]


def attest_release(
    bundle: Bundle,
    variant: Variant,
    key: SigningKey,
    number: int,
    *,
    issued_s: int,
    expires_s: int,
    profiles: Sequence[str] = (),
) -> tuple[Bundle, Release]:
    """Signs an engine as a release, and with it its provenance and quality; returns the bundle as it is now.

    A key says one thing about an engine, which is what it said last. Times are seconds since 1970.
    Raises SigningError, BundleError, or OSError for a disk that cannot be written.
    """
    release = Release.checked(
        {
            "name": variant.config.name,
            "release": number,
            "issued": times.to_text(issued_s),
            "expires": times.to_text(expires_s),
            "profiles": list(profiles),
        }
    )
    kept = []
    for data in bundle.attestations(variant.digest):
        envelope = Envelope.parse(data)
        if _is_of_the_build(envelope, variant.digest):
            kept.append(envelope.signed(key).to_json())
        elif [item.key_id for item in envelope.signatures] != [key.key_id]:
            kept.append(data)
    signed = Envelope(release.about(variant.digest).to_json()).signed(key)
    return attach(bundle, variant.digest, [*kept, signed.to_json()]), release


def _is_of_the_build(envelope: Envelope, digest: str) -> bool:
    """Whether it says how this engine was made, or how good it is: nothing else is signed unseen."""
    if envelope.payload_type != PAYLOAD_TYPE:
        return False
    statement = Statement.parse(envelope.payload)
    if (statement.predicate_type, statement.digest) == (PROVENANCE_TYPE, digest):
        return True
    return _report_in(statement, digest) is not None


def signed_reports(
    attestations: Sequence[bytes], keys: Sequence[PublicKey], digest: str
) -> list[SignedReport]:
    """The quality reports about an engine for which any of the keys stands; all else is passed over."""
    by_id = {key.key_id: key for key in keys}
    found = []
    for data in attestations:
        try:
            envelope = Envelope.parse(data)
            signed_by = envelope.signers(by_id) if envelope.payload_type == PAYLOAD_TYPE else []
            report = _report_in(Statement.parse(envelope.payload), digest) if signed_by else None
        except SigningError:
            continue
        if report is not None:
            found.append(SignedReport(report, tuple(signed_by)))
    return found


def said(data: bytes, digest: str) -> Claim:
    """What an attestation that is attached to the engine of that digest claims, for people."""
    try:
        envelope = Envelope.parse(data)
        statement = Statement.parse(envelope.payload)
        release = Release.of(statement) if statement.predicate_type == RELEASE_TYPE else None
        quality = _checked_report(statement) if statement.predicate_type == QUALITY_TYPE else None
    except SigningError as error:
        return Claim(f"unreadable ({error.message})", ())
    kind = _KINDS.get(statement.predicate_type, statement.predicate_type[:_KIND_CHARACTERS])
    key_ids = tuple(item.key_id for item in envelope.signatures)
    if statement.digest != digest:
        return Claim(f"{kind} of another engine", key_ids)
    return Claim(kind, key_ids, release, quality)


def _report_in(statement: Statement, digest: str) -> QualityReport | None:
    """The quality report about this engine, if the statement is a well-formed one."""
    if (statement.predicate_type, statement.digest) != (QUALITY_TYPE, digest):
        return None
    try:
        return _checked_report(statement)
    except SigningError:
        return None


def _checked_report(statement: Statement) -> QualityReport:
    try:
        return QualityReport.checked(statement.predicate)
    except BundleError as error:
        raise SigningError(error.message) from None
