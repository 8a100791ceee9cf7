"""Signed envelopes (DSSE 1.0): a payload, its type, and signatures over both.

https://github.com/secure-systems-lab/dsse. Nothing in the payload is looked at before a signature over it
has been verified. securesystemslib, which has the same format, brings 80 modules and 7 MiB into a process
for a line of encoding, so that line is here; the tests hold each against the other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgellm.bundle.manifest import Json, canonical_json, parse_json
from edgellm.bundle.referrers import MAX_ATTESTATION_BYTES
from edgellm.errors import BundleError
from edgellm.signing.errors import SigningError
from edgellm.signing.keys import PublicKey

if TYPE_CHECKING:
    from edgellm.signing.ed25519 import SigningKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_ENVELOPE_BYTES = MAX_ATTESTATION_BYTES
MAX_SIGNATURES = 8
_MAX_TEXT = 128


def pae(payload_type: str, payload: bytes) -> bytes:
    """What is signed: type and payload, each with its length, so that neither can become the other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


@dataclass(frozen=True)
class Signature:
    """Bytes of a signature, and which key is said to have made it."""

    key_id: str
    value: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload and who signed it; without signatures it says something that nobody stands for."""

    payload: bytes
    payload_type: str = PAYLOAD_TYPE
    signatures: tuple[Signature, ...] = ()

    def signed(self, key: SigningKey) -> Envelope:
        """The same with the key's signature; an earlier one of it is replaced."""
        others = tuple(item for item in self.signatures if item.key_id != key.key_id)
        if len(others) >= MAX_SIGNATURES:
            raise SigningError(f"an envelope has at most {MAX_SIGNATURES} signatures")
        own = Signature(key.key_id, key.sign(pae(self.payload_type, self.payload)))
        return replace(self, signatures=(*others, own))

    def signers(self, keys: Mapping[str, PublicKey]) -> list[PublicKey]:
        """Those of the keys, by key id, that did sign.

        A signature is tried with the key that it names and no other: so each costs one verification.
        """
        data = pae(self.payload_type, self.payload)
        named = ((keys.get(item.key_id), item.value) for item in self.signatures)
        return [key for key, value in named if key is not None and key.verifies(value, data)]

    def to_json(self) -> bytes:
        """The envelope as DSSE's JSON has it; raises SigningError if it is too large."""
        signatures = [{"keyid": item.key_id, "sig": _encoded(item.value)} for item in self.signatures]
        document: Json = {
            "payload": _encoded(self.payload),
            "payloadType": self.payload_type,
            "signatures": signatures,
        }
        data = canonical_json(document)
        if len(data) > MAX_ENVELOPE_BYTES:
            raise SigningError(f"an envelope of {len(data):,} bytes, more than {MAX_ENVELOPE_BYTES:,}")
        return data

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Reads bounded JSON in which no key comes twice; raises SigningError."""
        try:
            document = parse_json(data, "envelope", MAX_ENVELOPE_BYTES)
        except BundleError as error:
            raise SigningError(error.message) from None
        signatures = document.get("signatures")
        if not isinstance(signatures, list) or len(signatures) > MAX_SIGNATURES:
            raise SigningError(f"envelope: signatures is not a list of at most {MAX_SIGNATURES}")
        parsed = tuple(_parse_signature(item) for item in signatures)
        if len({item.key_id for item in parsed}) != len(parsed):
            raise SigningError("envelope: two signatures name the same key")
        kind = _text(document.get("payloadType"), "payloadType")
        return cls(_decoded(document.get("payload"), "payload"), kind, parsed)


def _parse_signature(value: object) -> Signature:
    if not isinstance(value, dict):
        raise SigningError("envelope: a signature is not an object")
    return Signature(_text(value.get("keyid"), "keyid"), _decoded(value.get("sig"), "sig"))


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isascii() or not 0 < len(value) <= _MAX_TEXT:
        raise SigningError(f"envelope: {what} is not a text of 1 to {_MAX_TEXT} ASCII characters")
    return value


def _decoded(value: object, what: str) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        pass
    raise SigningError(f"envelope: {what} is not base64")


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
