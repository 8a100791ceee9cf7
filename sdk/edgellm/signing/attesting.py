"""Signs what is said about the engines of a bundle, and shows what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.bundle import Bundle, Variant
from edgellm.bundle.attach import attach
from edgellm.signing import times
from edgellm.signing.dsse import PAYLOAD_TYPE, Envelope
from edgellm.signing.errors import SigningError
from edgellm.signing.statements import PROVENANCE_TYPE, RELEASE_TYPE, Release, Statement

if TYPE_CHECKING:
    from edgellm.signing.ed25519 import SigningKey


@dataclass(frozen=True)
class Claim:
    """An attestation by what it says itself; nothing of it has been checked."""

    kind: str
    key_ids: tuple[str, ...]
    release: Release | None = None


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
    """Signs an engine as a release, and its provenance with it; returns the bundle as it is now.

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
        if _is_provenance(envelope, variant.digest):
            kept.append(envelope.signed(key).to_json())
        elif [item.key_id for item in envelope.signatures] != [key.key_id]:
            kept.append(data)
    signed = Envelope(release.about(variant.digest).to_json()).signed(key)
    return attach(bundle, variant.digest, [*kept, signed.to_json()]), release


def _is_provenance(envelope: Envelope, digest: str) -> bool:
    """Whether it says how this engine was made: nothing else is signed unseen."""
    if envelope.payload_type != PAYLOAD_TYPE:
        return False
    statement = Statement.parse(envelope.payload)
    return (statement.predicate_type, statement.digest) == (PROVENANCE_TYPE, digest)


def said(data: bytes) -> Claim:
    """What an attestation claims, for people."""
    try:
        envelope = Envelope.parse(data)
        statement = Statement.parse(envelope.payload)
        release = Release.of(statement) if statement.predicate_type == RELEASE_TYPE else None
    except SigningError as error:
        return Claim(f"unreadable ({error.message})", ())
    kinds = {RELEASE_TYPE: "release", PROVENANCE_TYPE: "provenance"}
    kind = kinds.get(statement.predicate_type, statement.predicate_type)
    return Claim(kind, tuple(item.key_id for item in envelope.signatures), release)
