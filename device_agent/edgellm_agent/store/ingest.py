"""A blob on its way in: resumed where it was cut, hashed as it comes, visible once it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from edgellm.bundle.manifest import Descriptor
from edgellm_agent.errors import DataLossError, InvalidError, TooLargeError
from edgellm_agent.store.disk import publish, writing
from edgellm_agent.store.space import Space

_READ_BYTES = 1 << 20


class Ingest:
    """One writer at a time; `close` keeps what has come, for the next one.

    Args:
        blob: What is to come.
        partial: The file that it comes into; its length is the offset to go on from.
        path: Where the blob will be.
        space: Has reserved what the blob will take.
        on_close: Called when this writer's turn ends.
    """

    def __init__(
        self, blob: Descriptor, partial: Path, path: Path, space: Space, on_close: Callable[[], None]
    ) -> None:
        self._blob = blob
        self._partial = partial
        self._path = path
        self._space = space
        self._on_close = on_close
        with writing(partial.parent):
            self._file = partial.open("ab", buffering=0)
        self._hasher = hashlib.sha256()
        self.offset_bytes = self._rehash()

    def write(self, data: bytes) -> None:
        """Appends.

        Raises TooLargeError when the disk is full, StoreError when it fails, and InvalidError past the blob's
        size.
        """
        if self.offset_bytes + len(data) > self._blob.size_bytes:
            raise InvalidError(
                "chunk", f"{self._blob.digest} has {self._blob.size_bytes} bytes, more were sent"
            )
        view = memoryview(data)
        while view:
            written = self._write_some(view)
            self._hasher.update(view[:written])
            self.offset_bytes += written
            view = view[written:]

    def restart(self) -> None:
        """Drops what has come: the next byte is the blob's first."""
        with writing(self._partial):
            self._file.truncate(0)
        self._hasher = hashlib.sha256()
        self.offset_bytes = 0
        # The reserved blocks went too.
        self._space.reserve({self._partial: self._blob.size_bytes})

    def commit(self) -> None:
        """Makes a blob visible once it is whole.

        Raises DataLossError if it has another digest, or StoreError; what has come is dropped then.
        """
        if self.offset_bytes < self._blob.size_bytes:
            return
        if "sha256:" + self._hasher.hexdigest() != self._blob.digest:
            self._partial.unlink(missing_ok=True)
            raise DataLossError(f"what came does not have the digest {self._blob.digest}; it was dropped")
        try:
            with writing(self._partial):
                publish(self._file.fileno(), self._partial, self._path)
        except BaseException:
            # After a sync that failed nobody knows which bytes are on the disk, and another one may succeed.
            self._partial.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Ends this writer's turn."""
        self._file.close()
        self._on_close()

    def _write_some(self, view: memoryview) -> int:
        try:
            with writing(self._partial):
                return self._file.write(view) or 0
        except OSError:  # full
            left = self._blob.size_bytes - self.offset_bytes
            free = self._space.free_bytes()
            raise TooLargeError("the disk of the engine store is full", left, free) from None

    def _rehash(self) -> int:
        with self._partial.open("rb", buffering=0) as written:
            while data := written.read(_READ_BYTES):
                self._hasher.update(data)
            return written.tell()
