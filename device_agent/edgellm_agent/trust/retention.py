"""Which attestations about an engine a device keeps when more arrive: few enough, and the right ones. Pure.

An engine that is built again has the same digest and new notes about it, which would pile up. The rule:

1. Of what one trusted key signed about this engine in statements of one type, the best is kept. A release is
   better if it stands now, then if it is higher, then if it was issued later; anything else, if it arrived
   later.
2. Of what no trusted key signed, one is kept for each type and claimed signers: what arrived last. It says
   nothing for the engine, but the key may be trusted later.
3. Where that is still too much, what stands goes before what is signed, and that before all else.

So only what trusted keys signed displaces what one of them signed; junk, and signatures that are merely
claimed, displace each other. An engine stands by what is kept, and as the same release, as by all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgellm.bundle.referrers import MAX_ATTESTATIONS, check_bounds
from edgellm.errors import BundleError
from edgellm.signing.dsse import PAYLOAD_TYPE, Envelope
from edgellm.signing.errors import SigningError
from edgellm.signing.statements import RELEASE_TYPE, Release, Statement
from edgellm.signing.verification import Expected, Keyring, judge
from edgellm_agent.errors import InvalidError

_Slot = tuple[str, ...]
"""Attestations that share one are kept once."""
_UNUSABLE: _Slot = ("unusable",)


@dataclass(frozen=True, order=True)
class _Worth:
    """Compared field by field, the first that differs decides."""

    stands: bool
    signed: bool
    release: int
    issued_s: int
    arrival: int
    """Unique, so nothing is as good as another."""


def retained(
    stored: Sequence[bytes], arrived: Sequence[bytes], keys: Keyring, expected: Expected
) -> list[bytes]:
    """What is kept of both, in the order in which it arrived: at most MAX_ATTESTATIONS.

    Args:
        stored: As an earlier call returned it.
        arrived: Nothing about it has been checked.
        keys: Only the trusted ones count.
        expected: The engine, the device and the time to judge releases by.

    Raises:
        InvalidError: Too many or too large ones arrived at once.
    """
    try:
        check_bounds(tuple(arrived))
    except BundleError as error:
        raise InvalidError("attestations", error.message) from None
    arrivals = {data: number for number, data in enumerate([*stored, *arrived])}
    best: dict[_Slot, tuple[_Worth, bytes]] = {}
    for data, arrival in arrivals.items():
        for slot, worth in _claims(data, arrival, keys, expected):
            best[slot] = max((worth, data), best.get(slot, (worth, data)))
    ranked = dict.fromkeys(data for _, data in sorted(best.values(), reverse=True))
    return sorted(list(ranked)[:MAX_ATTESTATIONS], key=arrivals.__getitem__)


def _claims(data: bytes, arrival: int, keys: Keyring, expected: Expected) -> Iterator[tuple[_Slot, _Worth]]:
    """Slots that an envelope may fill, one for each trusted key that signed it, and its worth there."""
    unsigned = _Worth(stands=False, signed=False, release=0, issued_s=0, arrival=arrival)
    try:
        envelope = Envelope.parse(data)
        # A verdict never looks into what nobody signed; here its type says only which other note makes way.
        statement = Statement.parse(envelope.payload)
    except SigningError:
        yield _UNUSABLE, unsigned
        return
    if envelope.payload_type != PAYLOAD_TYPE or statement.digest != expected.digest:
        yield _UNUSABLE, unsigned
        return
    kind = statement.predicate_type
    signed_by = envelope.signers({key.key_id: key for key in keys.trusted})
    for key in signed_by:
        stands = bool(judge([data], Keyring(trusted=(key,)), expected).standing)
        release, issued_s = _release(statement)
        yield ("signed", kind, key.key_id), _Worth(stands, True, release, issued_s, arrival)
    if not signed_by:
        yield ("unsigned", kind, *sorted(item.key_id for item in envelope.signatures)), unsigned


def _release(statement: Statement) -> tuple[int, int]:
    """Number and time of a release, seconds since 1970; zeros for what is none, or none that can be read."""
    if statement.predicate_type != RELEASE_TYPE:
        return 0, 0
    try:
        release = Release.of(statement)
    except SigningError:
        return 0, 0
    return release.release, release.issued
