"""The blob store.

Content by digest, written under a reference that can be resumed, visible only once its digest is right.

    <root>/blobs/sha256/<hex>     whole, verified, read-only
    <root>/ingest/<hex>           what has come of a blob so far; its length is the offset to go on from
    <root>/engines/<hex>/<title>  the files of a registered engine: hard links into blobs

A power cut leaves ingests that can be resumed and blobs that are whole: a blob is synced before it gets its
name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import Descriptor, EngineManifest
from edgellm_agent.errors import (
    ConflictError,
    DataLossError,
    InvalidError,
    NotFoundError,
    OffsetError,
    TooLargeError,
)

_READ_BYTES = 1 << 20


class Ingest:
    """A blob on its way in. One writer at a time; `close` keeps what has come, for the next one."""

    def __init__(self, store: Store, blob: Descriptor) -> None:
        self._store = store
        self._blob = blob
        self._path = store.ingest_path(blob.digest)
        self._file = self._path.open("ab", buffering=0)
        self._hasher = hashlib.sha256()
        self.offset_bytes = self._rehash()

    def write(self, data: bytes) -> None:
        """Appends; raises TooLargeError when the disk is full and InvalidError past the blob's size."""
        if self.offset_bytes + len(data) > self._blob.size_bytes:
            raise InvalidError(
                "chunk", f"{self._blob.digest} has {self._blob.size_bytes} bytes, more were sent"
            )
        view = memoryview(data)
        while view:
            try:
                written = self._file.write(view)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                left = self._blob.size_bytes - self.offset_bytes
                raise TooLargeError(
                    "the disk of the engine store is full", left, self._store.free_bytes()
                ) from None
            self._hasher.update(view[:written])
            self.offset_bytes += written or 0
            view = view[written:]

    def restart(self) -> None:
        """Drops what has come: the next byte is the blob's first."""
        self._file.truncate(0)
        self._hasher = hashlib.sha256()
        self.offset_bytes = 0

    def commit(self) -> None:
        """Makes the blob visible; raises DataLossError, and drops the bytes, if they have another digest."""
        if self.offset_bytes < self._blob.size_bytes:
            return
        if "sha256:" + self._hasher.hexdigest() != self._blob.digest:
            self._path.unlink()
            raise DataLossError(f"what came does not have the digest {self._blob.digest}; it was dropped")
        os.fsync(self._file.fileno())
        self._path.chmod(0o440)
        self._path.rename(self._store.blob_path(self._blob.digest))
        _sync_directory(self._store.blobs)

    def close(self) -> None:
        """Ends this writer's turn."""
        self._file.close()
        self._store.end(self._blob.digest)

    def _rehash(self) -> int:
        with self._path.open("rb", buffering=0) as written:
            while data := written.read(_READ_BYTES):
                self._hasher.update(data)
            return written.tell()


class Store:
    """Blobs on disk. Calls block; the daemon makes those that move many bytes from a thread."""

    def __init__(self, root: Path) -> None:
        self.blobs = root / "blobs" / "sha256"
        self._ingests = root / "ingest"
        self._engines = root / "engines"
        self._writing: set[str] = set()
        for directory in (self.blobs, self._ingests, self._engines):
            directory.mkdir(parents=True, exist_ok=True)

    def blob_path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        return self.blobs / digests.hex_of(digest)

    def ingest_path(self, digest: str) -> Path:
        """Where the bytes of an unfinished blob are."""
        return self._ingests / digests.hex_of(digest)

    def has(self, digest: str) -> bool:
        """Whether the blob is here, whole."""
        return self.blob_path(digest).exists()

    def missing(self, blobs: Iterable[Descriptor]) -> list[tuple[Descriptor, int]]:
        """The blobs that are not here, each with the bytes that an earlier write left."""
        return [(b, self.status(b.digest)) for b in blobs if not self.has(b.digest)]

    def status(self, digest: str) -> int:
        """Bytes that have come of an unfinished blob."""
        try:
            return self.ingest_path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def ingest(self, blob: Descriptor, offset_bytes: int) -> Ingest:
        """Begins or resumes a write.

        Raises OffsetError with the right offset, or ConflictError if another writes it.
        """
        if blob.digest in self._writing:
            raise ConflictError(f"{blob.digest} is being written by another push")
        if offset_bytes != self.status(blob.digest):
            raise OffsetError(blob.digest, self.status(blob.digest))
        self._writing.add(blob.digest)
        try:
            return Ingest(self, blob)
        except BaseException:
            self._writing.discard(blob.digest)
            raise

    def end(self, digest: str) -> None:
        """The blob may be written by another."""
        self._writing.discard(digest)

    def put(self, data: bytes) -> str:
        """Stores a small blob; returns its digest."""
        digest = digests.of_bytes(data)
        if not self.has(digest):
            with contextlib.suppress(FileNotFoundError):
                self.ingest_path(digest).unlink()
            writer = self.ingest(Descriptor("", digest, len(data)), 0)
            try:
                writer.write(data)
                writer.commit()
            finally:
                writer.close()
        return digest

    def read(self, digest: str) -> bytes:
        """A small blob's bytes; raises NotFoundError, or DataLossError for changed ones, which it drops."""
        path = self.blob_path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"blob {digest} is not here; push the engine again") from None
        if digests.of_bytes(data) != digest:
            path.unlink()
            raise DataLossError(f"blob {digest} was changed on disk; push the engine again")
        return data

    def verify(self, manifest: EngineManifest) -> None:
        """Reads every byte of an engine.

        Raises NotFoundError or DataLossError, which name the file, and drops what is bad.
        """
        for layer in manifest.layers:
            path = self.blob_path(layer.digest)
            if not path.exists():
                raise NotFoundError(f"{layer.title} ({layer.digest}) is not here; push the engine again")
            if digests.of_file(path) != layer.digest:
                path.unlink()
                raise DataLossError(f"{layer.title} was changed on disk; push the engine again")

    def link(self, manifest: EngineManifest) -> Path:
        """A directory with the engine's files by their titles."""
        directory = self._engines / digests.hex_of(manifest.digest)
        building = directory.with_suffix(".new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for layer in manifest.layers:
            os.link(self.blob_path(layer.digest), building / layer.title)
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
        return directory

    def collect(self, engines: Collection[EngineManifest]) -> int:
        """Removes all that none of these engines needs; returns the bytes that came free."""
        keep = {digests.hex_of(m.digest) for m in engines}
        for directory in self._engines.iterdir():
            if directory.name not in keep:
                shutil.rmtree(directory, ignore_errors=True)
        keep |= {digests.hex_of(b.digest) for m in engines for b in m.blobs()}
        writing = {digests.hex_of(d) for d in self._writing}
        freed = 0
        for path in (*self.blobs.iterdir(), *self._ingests.iterdir()):
            if path.name not in keep | writing:
                freed += path.stat().st_size
                path.unlink()
        return freed

    def free_bytes(self) -> int:
        """Free space of the file system."""
        return shutil.disk_usage(self.blobs).free


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
