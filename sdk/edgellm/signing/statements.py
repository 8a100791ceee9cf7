"""What is signed: in-toto statements (v1) about one engine manifest, and our predicate, the release.

https://github.com/in-toto/attestation. A release says: this engine, under this name and number, for these
boards, until then. It is what a device asks for; provenance says how the engine was made, a quality report
how near it is to the model that it was made of, and both are for people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictInt,
    ValidationError,
)

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import Json, canonical_json, parse_json
from edgellm.errors import BundleError
from edgellm.signing import times
from edgellm.signing.dsse import MAX_ENVELOPE_BYTES
from edgellm.signing.errors import SigningError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
RELEASE_TYPE = "urn:edgellm:release:v1"
PROVENANCE_TYPE = "https://slsa.dev/provenance/v1"
QUALITY_TYPE = "urn:edgellm:quality:v1"
# What SQLite can hold; who counts by one never comes here.
MAX_RELEASE = 2**63 - 1
MAX_PROFILES = 64

_Time = Annotated[int, BeforeValidator(times.from_text), PlainSerializer(times.to_text)]
_Profile = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


@dataclass(frozen=True)
class Statement:
    """A predicate about one engine; `digest` is that of the engine's manifest."""

    name: str
    digest: str
    predicate_type: str
    predicate: Json

    def to_json(self) -> bytes:
        """The payload of an envelope."""
        subject = {"name": self.name, "digest": {"sha256": digests.hex_of(self.digest)}}
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": [subject],
                "predicateType": self.predicate_type,
                "predicate": self.predicate,
            }
        )

    @classmethod
    def parse(cls, payload: bytes) -> Statement:
        """Reads a statement with exactly one subject; raises SigningError."""
        try:
            document = parse_json(payload, "statement", MAX_ENVELOPE_BYTES)
        except BundleError as error:
            raise SigningError(error.message) from None
        if document.get("_type") != STATEMENT_TYPE:
            raise SigningError(f"statement: _type is {document.get('_type')!r:.80}, not {STATEMENT_TYPE!r}")
        name, digest = _subject(document.get("subject"))
        kind, predicate = document.get("predicateType"), document.get("predicate")
        if not isinstance(kind, str) or not isinstance(predicate, dict):
            raise SigningError("statement: predicateType is not a text, or predicate not an object")
        return cls(name, digest, kind, predicate)


class Release(BaseModel):
    """The predicate of a release; what it does not know it refuses: it could narrow what was meant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")
    """As the engine's config has it."""
    release: Annotated[StrictInt, Field(gt=0, le=MAX_RELEASE)]
    """Grows with each release of the name."""
    issued: _Time
    expires: _Time
    profiles: tuple[_Profile, ...] = Field(default=(), max_length=MAX_PROFILES)
    """Boards that it is for; none: any."""

    @classmethod
    def of(cls, statement: Statement) -> Release:
        """The release in a statement; raises SigningError, which names the field."""
        return cls.checked(statement.predicate)

    @classmethod
    def checked(cls, predicate: Json) -> Release:
        """A release from its JSON; raises SigningError, which names the field."""
        try:
            release = cls.model_validate(predicate)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            what = first["msg"].removeprefix("Value error, ")
            raise SigningError(f"release: {where or 'predicate'}: {what}") from None
        if release.expires <= release.issued:
            raise SigningError("release: expires is not after issued")
        return release

    def about(self, digest: str) -> Statement:
        """The statement that this engine is that release."""
        return Statement(self.name, digest, RELEASE_TYPE, self.model_dump(mode="json"))


def _subject(value: object) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise SigningError("statement: subject is not a list of one object")
    name, hashes = value[0].get("name"), value[0].get("digest")
    digest = f"sha256:{hashes.get('sha256')}" if isinstance(hashes, dict) else ""
    if not isinstance(name, str) or not digests.is_digest(digest):
        raise SigningError("statement: the subject has no name, or no SHA-256 digest")
    return name, digest
