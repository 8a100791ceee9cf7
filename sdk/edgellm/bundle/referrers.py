"""Attestations as OCI referrers: what is said about an engine, beside it and without changing its digest.

Each is a manifest of its own whose `subject` is the engine's manifest and whose only layer is a DSSE
envelope. In a bundle they are listed beside the engines, so that whatever copies the bundle copies them; a
registry lists them by the referrers API, or under the tag `sha256-<hex>` where it has none (OCI distribution
specification 1.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from edgellm.bundle import digest as digests
from edgellm.bundle import manifest as manifests
from edgellm.bundle.manifest import Descriptor, Json, canonical_json, parse_descriptor, parse_json
from edgellm.errors import BundleError

ATTESTATION_TYPE = "application/vnd.dsse.envelope.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
MAX_ATTESTATIONS = 16
MAX_ATTESTATION_BYTES = 64 << 10
MAX_REFERRER_BYTES = 16 << 10
# A list of referrers: as long as a few hundred of them.
MAX_LIST_BYTES = 256 << 10
_MAX_LISTED_BYTES = {
    manifests.MANIFEST_MEDIA_TYPE: MAX_REFERRER_BYTES,
    manifests.INDEX_MEDIA_TYPE: MAX_LIST_BYTES,
}


@dataclass(frozen=True)
class Referrer:
    """The manifest of one attestation."""

    subject: str
    """Digest of the engine's manifest."""
    envelope: Descriptor
    raw: bytes = field(repr=False)

    @classmethod
    def build(cls, subject: Descriptor, envelope: bytes) -> Referrer:
        """The manifest for an envelope; raises BundleError if that is too large."""
        check_bounds([envelope])
        document: Json = {
            "schemaVersion": 2,
            "mediaType": manifests.MANIFEST_MEDIA_TYPE,
            "artifactType": ATTESTATION_TYPE,
            "config": Descriptor(EMPTY_TYPE, digests.of_bytes(EMPTY), len(EMPTY)).to_dict(),
            "layers": [Descriptor(ATTESTATION_TYPE, digests.of_bytes(envelope), len(envelope)).to_dict()],
            "subject": subject.to_dict(),
        }
        return cls.parse(canonical_json(document))

    @classmethod
    def parse(cls, data: bytes) -> Referrer:
        """Checks all that can be checked without the blob; raises BundleError."""
        document = parse_json(data, "referrer", MAX_REFERRER_BYTES)
        if not is_referrer(document):
            raise BundleError(f"referrer: artifactType is {document.get('artifactType')!r:.100}")
        layers = document.get("layers")
        if not isinstance(layers, list) or len(layers) != 1:
            raise BundleError("referrer: layers is not a list of one envelope")
        envelope = parse_descriptor(layers[0], "envelope", MAX_ATTESTATION_BYTES)
        if envelope.media_type != ATTESTATION_TYPE:
            raise BundleError(f"referrer: its layer is {envelope.media_type!r}, not {ATTESTATION_TYPE!r}")
        subject = parse_descriptor(document.get("subject"), "subject", manifests.MAX_MANIFEST_BYTES)
        return cls(subject.digest, envelope, data)

    @cached_property
    def descriptor(self) -> Descriptor:
        """The manifest's own."""
        return Descriptor(manifests.MANIFEST_MEDIA_TYPE, digests.of_bytes(self.raw), len(self.raw))

    def index_entry(self) -> Json:
        """How an index lists it."""
        return {**self.descriptor.to_dict(), "artifactType": ATTESTATION_TYPE}


def is_referrer(document: Json) -> bool:
    """Whether a manifest is that of an attestation."""
    return document.get("artifactType") == ATTESTATION_TYPE


def check_bounds(attestations: list[bytes] | tuple[bytes, ...]) -> None:
    """Raises BundleError for more or larger attestations than anybody takes."""
    if len(attestations) > MAX_ATTESTATIONS:
        raise BundleError(f"{len(attestations)} attestations of one engine, more than {MAX_ATTESTATIONS}")
    for envelope in attestations:
        if len(envelope) > MAX_ATTESTATION_BYTES:
            raise BundleError(
                f"an attestation of {len(envelope):,} bytes, more than {MAX_ATTESTATION_BYTES:,}"
            )


def parse_list(data: bytes, what: str) -> list[Descriptor]:
    """What in a list may be an attestation, or may list some; raises BundleError.

    A list that names types names ours; copies made by other tools name none, and then the manifest says.
    """
    document = parse_json(data, what, MAX_LIST_BYTES)
    entries = document.get("manifests")
    if not isinstance(entries, list):
        raise BundleError(f"{what}: manifests is not a list")
    listed = [(parse_descriptor(entry, what), entry.get("artifactType")) for entry in entries]
    return [
        blob
        for blob, kind in listed
        if kind in {None, ATTESTATION_TYPE} and blob.size_bytes <= _MAX_LISTED_BYTES.get(blob.media_type, -1)
    ]
