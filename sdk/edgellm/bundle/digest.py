"""Digests as OCI writes them: "sha256:" and 64 lower-case hexadecimal digits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from edgellm.errors import BundleError

CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    """Whether `text` is a well-formed SHA-256 digest."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def checked(text: object) -> str:
    """Returns `text` if it is a well-formed digest; raises BundleError otherwise."""
    if not isinstance(text, str) or not is_digest(text):
        raise BundleError(f"not a SHA-256 digest: {text!r:.100}")
    return text


def hex_of(digest: str) -> str:
    """The 64 hexadecimal digits, which are also the blob's file name; raises BundleError on anything else."""
    return checked(digest).removeprefix("sha256:")


def short(digest: str) -> str:
    """The first 12 hexadecimal digits: enough for a person to tell engines apart."""
    return hex_of(digest)[:12]


def of_bytes(data: bytes) -> str:
    """Digest of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Digest of a file, read in pieces; `on_bytes` is told the size of each. Raises OSError."""
    with path.open("rb", buffering=0) as source:
        return of_stream(source, on_bytes)


def of_stream(
    source: BinaryIO, on_bytes: Callable[[int], None] | None = None, copy_to: BinaryIO | None = None
) -> str:
    """Digest of the rest of a stream, copied to `copy_to` on the way if that is given. Raises OSError."""
    hasher = hashlib.sha256()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        hasher.update(view[:count])
        if copy_to is not None:
            copy_to.write(view[:count])
        if on_bytes is not None:
            on_bytes(count)
    return "sha256:" + hasher.hexdigest()
