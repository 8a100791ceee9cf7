"""What the parts here share with each other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from edgellm.bundle.manifest import Descriptor


class SourceError(Exception):
    """A source did not give what it was asked for: one sentence of what went wrong.

    Args:
        message: The sentence.
        permanent: Trying again would not help.
        retry_after_s: When the source said that it may be asked again.
        absent: The source answered that it has no such thing.
    """

    def __init__(
        self, message: str, *, permanent: bool = False, retry_after_s: float = 0, absent: bool = False
    ) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_s = retry_after_s
        self.absent = absent


class RangeError(Exception):
    """The source cannot go on from where the bytes on the device end: begin again from zero."""


class WrongBytesError(Exception):
    """What came is not the blob: it has another size."""


class BlobSource(Protocol):
    """Where the blobs of an engine are. All calls raise SourceError."""

    async def manifest(self, digest: str) -> bytes:
        """The manifest's bytes, bounded and not checked yet."""

    def attestations(self, digest: str) -> AsyncGenerator[bytes, None]:
        """The envelopes that the source has about an engine: bounded, by their digests, and not judged.

        There may be more of them than a device keeps: a registry has those of each build. What cannot be read
        as one is passed over: without it the engine may be refused, with it never taken.
        """

    def blob(self, blob: Descriptor, offset: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The blob's bytes from an offset on, in pieces of at most 256 KiB.

        Raises RangeError, and WrongBytesError as soon as the size cannot be right.
        """
