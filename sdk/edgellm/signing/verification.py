"""What attestations are worth: which trusted keys stand for an engine, as which release, and why not more.

A pure function: the same envelopes, keys and time give the same verdict, on a device and at a desk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgellm.bundle import digest as digests
from edgellm.signing import times
from edgellm.signing.dsse import PAYLOAD_TYPE, Envelope
from edgellm.signing.errors import SigningError
from edgellm.signing.keys import PublicKey
from edgellm.signing.statements import RELEASE_TYPE, Release, Statement


@dataclass(frozen=True)
class Keyring:
    """Keys that count, and keys that did."""

    trusted: tuple[PublicKey, ...] = ()
    revoked: tuple[PublicKey, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What the statement must be about."""

    digest: str
    """Of the engine's manifest."""
    name: str
    """As the engine's config has it."""
    profile: str | None
    """Of the device; None where no device is meant."""
    now_s: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Standing:
    """A trusted key stands for the engine as this release."""

    key: PublicKey
    release: Release


@dataclass(frozen=True)
class Verdict:
    """All that stand for the engine; and of the envelopes that say nothing for it, why."""

    standing: tuple[Standing, ...]
    reasons: tuple[str, ...]


@dataclass
class _Findings:
    standing: list[Standing] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def take(self, data: bytes, keys: Keyring, expected: Expected) -> None:
        try:
            _judge_one(Envelope.parse(data), keys, expected, self)
        except SigningError as error:
            self.objects(error.message)

    def objects(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def judge(attestations: Sequence[bytes], keys: Keyring, expected: Expected) -> Verdict:
    """Judges each envelope by itself: a bad one beside a good one takes nothing from it."""
    findings = _Findings()
    for data in attestations:
        findings.take(data, keys, expected)
    if not findings.standing and not findings.reasons:
        findings.objects("no release is signed")
    return Verdict(tuple(findings.standing), tuple(findings.reasons))


def signers(attestations: Sequence[bytes], keys: Sequence[PublicKey], digest: str) -> set[str]:
    """Key ids of those that signed any release of the engine, also one that no longer counts."""
    by_id = {key.key_id: key for key in keys}
    found: set[str] = set()
    for data in attestations:
        try:
            envelope = Envelope.parse(data)
            signed_by = envelope.signers(by_id) if envelope.payload_type == PAYLOAD_TYPE else []
            statement = Statement.parse(envelope.payload) if signed_by else None
        except SigningError:
            continue
        if statement is not None and (statement.predicate_type, statement.digest) == (RELEASE_TYPE, digest):
            found |= {key.key_id for key in signed_by}
    return found


def _judge_one(envelope: Envelope, keys: Keyring, expected: Expected, findings: _Findings) -> None:
    if envelope.payload_type != PAYLOAD_TYPE:
        raise SigningError(f"an envelope holds {envelope.payload_type!r}, not an in-toto statement")
    signed_by = envelope.signers({key.key_id: key for key in keys.trusted})
    if not signed_by:
        if envelope.signatures:
            raise SigningError(_who(envelope, keys))
        return  # Provenance as the build host left it: nobody stands for it, and nothing is wrong.
    statement = Statement.parse(envelope.payload)
    if statement.predicate_type != RELEASE_TYPE:
        return
    release = Release.of(statement)
    if reason := _mismatch(statement, release, expected):
        raise SigningError(reason)
    for key in signed_by:
        if reason := _out_of_time(key, release, expected.now_s):
            findings.objects(reason)
        else:
            findings.standing.append(Standing(key, release))


def _who(envelope: Envelope, keys: Keyring) -> str:
    """Whose signatures these are, none of which counts."""
    trusted = {key.key_id: key for key in keys.trusted}
    revoked = {key.key_id: key for key in keys.revoked}
    for item in envelope.signatures:
        if item.key_id in trusted:
            return f"the signature of {trusted[item.key_id].name} does not match what it is on"
        if item.key_id in revoked:
            return f"it is signed by {revoked[item.key_id].name}, which was revoked here"
    ids = ", ".join(repr(item.key_id[:12]) for item in envelope.signatures)
    return f"it is signed by a key that is not trusted here (key id {ids})"


def _mismatch(statement: Statement, release: Release, expected: Expected) -> str:
    if statement.digest != expected.digest:
        return f"a signed release is of another engine, {digests.short(statement.digest)}"
    if release.name != expected.name:
        return f"the signed release is of {release.name!r}, the engine is {expected.name!r}"
    if release.profiles and expected.profile is not None and expected.profile not in release.profiles:
        meant = ", ".join(release.profiles)
        return f"release {release.release} is for {meant}, and this device is {expected.profile!r}"
    return ""


def _out_of_time(key: PublicKey, release: Release, now_s: float) -> str:
    """Both the time of signing and now must lie before the key's end.

    The time of signing is the signer's word: who has stolen an old key can write any.
    """
    if release.expires <= now_s:
        return f"release {release.release} expired on {times.day(release.expires)}"
    if key.not_before_s is not None and release.issued < key.not_before_s:
        return f"it was signed on {times.day(release.issued)}, before {key.name} was valid"
    if key.not_after_s is not None and max(release.issued, now_s) > key.not_after_s:
        return f"the key {key.name} was valid until {times.day(key.not_after_s)}"
    return ""
