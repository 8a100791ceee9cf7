"""Public keys, with a name and a time in which they count, and the files that hold them.

NAME.pub.json is for everybody; NAME.key (PKCS#8, mode 600) is the private key and for its owner only.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from edgellm import paths
from edgellm.signing import times
from edgellm.signing.errors import SigningError

if TYPE_CHECKING:
    from edgellm.signing.ed25519 import SigningKey

PUBLIC_SUFFIX = ".pub.json"
PRIVATE_SUFFIX = ".key"
MAX_KEY_FILE_BYTES = 16 << 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class PublicKey:
    """Whose signature it is, and when it counts; times are seconds since 1970, None is no bound."""

    name: str
    key_id: str
    """SHA-256 of the public key's DER bytes, hex."""
    pem: str
    not_before_s: int | None = None
    not_after_s: int | None = None

    @classmethod
    def from_pem(
        cls, name: str, pem: bytes, not_before_s: int | None = None, not_after_s: int | None = None
    ) -> PublicKey:
        """Checks all of it; raises SigningError."""
        from edgellm.signing import ed25519  # noqa: PLC0415 - see there

        if not _NAME.fullmatch(name):
            raise SigningError(
                f"not a name for a key: {name!r:.80}", "letters, digits and . _ @ -, at most 64 of them"
            )
        if len(pem) > MAX_KEY_FILE_BYTES:
            raise SigningError(f"{len(pem):,} bytes are no Ed25519 key")
        if any(
            time_s is not None and not 0 <= time_s <= times.MAX_S for time_s in (not_before_s, not_after_s)
        ):
            raise SigningError(f"{name}: not a time between 1970 and 9999", "correct the times")
        if not_before_s is not None and not_after_s is not None and not_before_s >= not_after_s:
            raise SigningError(f"{name}: not_after must come after not_before", "correct the times")
        key_id, plain_pem = ed25519.read_public(pem)
        return cls(name, key_id, plain_pem, not_before_s, not_after_s)

    @property
    def short_id(self) -> str:
        """Enough for a person to tell keys apart."""
        return self.key_id[:12]

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether the key's owner signed the data."""
        from edgellm.signing import ed25519  # noqa: PLC0415 - see there

        return ed25519.verifies(self.pem, signature, data)

    def to_json(self) -> bytes:
        """As in NAME.pub.json."""
        document = _KeyFile.model_construct(
            name=self.name,
            key_id=self.key_id,
            public_pem=self.pem,
            not_before=self.not_before_s,
            not_after=self.not_after_s,
        )
        return document.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> PublicKey:
        """Raises SigningError, which names the field."""
        try:
            document = _KeyFile.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SigningError(f"not a public key file: {where or 'document'}: {first['msg']}") from None
        key = cls.from_pem(
            document.name, document.public_pem.encode(), document.not_before, document.not_after
        )
        if document.key_id not in {None, key.key_id}:
            raise SigningError(f"key_id is {document.key_id!r:.80}, but the key's is {key.key_id}")
        return key


_Time = Annotated[
    int, BeforeValidator(times.from_text), PlainSerializer(times.to_text, when_used="json-unless-none")
]


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    key_id: str | None = None
    public_pem: str
    not_before: _Time | None = None
    not_after: _Time | None = None


def read_public_key(path: Path) -> PublicKey:
    """Reads NAME.pub.json, or a plain PEM, whose name is the file's; raises SigningError."""
    data = _read(path)
    try:
        if data.lstrip().startswith(b"{"):
            return PublicKey.from_json(data)
        return PublicKey.from_pem(path.name.split(".")[0], data)
    except SigningError as error:
        hint = error.hint or "give a .pub.json that `edgellm key generate` wrote"
        raise SigningError(f"{path}: {error.message}", hint) from None


def read_signing_key(path: Path, passphrase: bytes | None = None) -> SigningKey:
    """Reads a private key; raises SigningError, also for one that others may read."""
    from edgellm.signing.ed25519 import SigningKey  # noqa: PLC0415 - see there

    data = _read(path)
    if path.stat().st_mode & 0o077:
        raise SigningError(f"{path} can be read by others than its owner", f"chmod 600 {path}")
    try:
        return SigningKey.from_pem(data, passphrase)
    except SigningError as error:
        raise SigningError(f"{path}: {error.message}", error.hint) from None


def is_encrypted(path: Path) -> bool:
    """Whether the private key there needs a passphrase; raises SigningError."""
    return b"ENCRYPTED PRIVATE KEY" in _read(path)


def generate(
    directory: Path,
    name: str,
    *,
    not_before_s: int | None = None,
    not_after_s: int | None = None,
    passphrase: bytes | None = None,
) -> tuple[PublicKey, Path]:
    """Makes NAME.key and NAME.pub.json; returns the public key and where the private one is.

    Raises SigningError where one of them exists: a key is never overwritten.
    """
    from edgellm.signing.ed25519 import SigningKey  # noqa: PLC0415 - see there

    signing = SigningKey.generate()
    public = PublicKey.from_pem(name, signing.public_pem.encode(), not_before_s, not_after_s)
    private_path, public_path = directory / (name + PRIVATE_SUFFIX), directory / (name + PUBLIC_SUFFIX)
    directory.mkdir(parents=True, exist_ok=True)
    if public_path.exists():
        raise SigningError(f"{public_path} exists", "choose another name: keys are not overwritten")
    try:
        # It must never be readable for others, not even before a chmod.
        descriptor = os.open(private_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SigningError(
            f"{private_path} exists", "choose another name: keys are not overwritten"
        ) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(signing.to_pem(passphrase))
        paths.write_atomically(public_path, public.to_json())
        public_path.chmod(0o644)
    except BaseException:
        private_path.unlink()
        raise
    return public, private_path


def keys_dir() -> Path:
    """Where keys are made, and looked for by name."""
    return paths.config_dir() / "keys"


def find(key: str, suffix: str) -> Path:
    """A key's file by its path, or by the name of a key in `keys_dir`; raises SigningError."""
    for path in (Path(key), keys_dir() / (key + suffix)):
        if path.is_file():
            return path
    raise SigningError(
        f"no key file {key}, and no {key}{suffix} in {keys_dir()}", "make one with `edgellm key generate`"
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise SigningError(f"{path}: {error.strerror}", "check the path") from None
    if len(data) > MAX_KEY_FILE_BYTES:
        raise SigningError(f"{path} is too large for a key", "check the path")
    return data
