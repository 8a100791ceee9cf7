"""The store on disk.

    <root>/blobs/sha256/<hex>     whole, verified, read-only
    <root>/ingest/<hex>           what has come of a blob so far; its length is the offset to go on from
    <root>/engines/<hex>/<title>  the files of a registered engine: hard links into blobs

A power cut leaves ingests that can be resumed and blobs that are whole: a blob is synced before it gets its
name. Whatever else a crash leaves, `collect` removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import Descriptor, EngineManifest
from edgellm_agent.errors import ConflictError, DataLossError, NotFoundError, OffsetError, TooLargeError
from edgellm_agent.store.disk import check_writable, sync_directory, write_whole, writing
from edgellm_agent.store.ingest import Ingest
from edgellm_agent.store.settings import StoreSettings
from edgellm_agent.store.space import Space, lacking_bytes, taken_bytes


class Store:
    """Blobs on disk. Calls block; the daemon makes those that move many bytes from a thread.

    Raises StoreError where the directory cannot be written.
    """

    def __init__(self, root: Path, settings: StoreSettings | None = None) -> None:
        self.blobs = root / "blobs" / "sha256"
        self._ingests = root / "ingest"
        self._engines = root / "engines"
        self._writing: set[str] = set()
        with writing(root):
            for directory in (self.blobs, self._ingests, self._engines):
                directory.mkdir(parents=True, exist_ok=True)
            for directory in (root, self.blobs.parent):
                sync_directory(directory)
        check_writable(self._ingests)
        self._space = Space(self.blobs, (settings or StoreSettings()).spare_bytes)

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

    def reserve(self, blobs: Iterable[Descriptor]) -> None:
        """Takes the disk space of all that is missing, before it comes; once is enough, and twice no harm.

        Raises TooLargeError, or StoreError, and then nothing more is reserved than before. What is reserved
        comes free when the blob is dropped, or by `collect` once no engine needs it.
        """
        self._space.reserve(
            {self.ingest_path(b.digest): b.size_bytes for b in blobs if not self.has(b.digest)}
        )

    def lacking_bytes(self, blobs: Iterable[Descriptor]) -> int:
        """Disk space that these blobs still need, less what is reserved for them."""
        return sum(
            lacking_bytes(self.ingest_path(b.digest), b.size_bytes) for b in blobs if not self.has(b.digest)
        )

    def ingest(self, blob: Descriptor, offset_bytes: int) -> Ingest:
        """Begins or resumes a write.

        Raises OffsetError with the right offset, ConflictError if another writes it, or as `reserve` does.
        """
        if blob.digest in self._writing:
            raise ConflictError(f"{blob.digest} is being written by another push")
        if self.has(blob.digest):  # Another push was faster.
            raise OffsetError(blob.digest, blob.size_bytes)
        if offset_bytes != self.status(blob.digest):
            raise OffsetError(blob.digest, self.status(blob.digest))
        self._writing.add(blob.digest)
        try:
            # Usually it is reserved; not, if bytes of this blob were just dropped as wrong.
            self.reserve([blob])
            partial, path = self.ingest_path(blob.digest), self.blob_path(blob.digest)
            return Ingest(blob, partial, path, self._space, lambda: self._writing.discard(blob.digest))
        except BaseException:
            self._writing.discard(blob.digest)
            raise

    def put(self, data: bytes) -> str:
        """Stores a small blob; returns its digest. Raises TooLargeError or StoreError."""
        digest = digests.of_bytes(data)
        if not self.has(digest):
            partial = self.ingest_path(digest).with_suffix(".put")
            with self._changing(partial, len(data)):
                write_whole(partial, data, self.blob_path(digest))
                if digest not in self._writing:
                    # What `reserve` took for it, or an earlier write left.
                    self.ingest_path(digest).unlink(missing_ok=True)
        return digest

    def read(self, digest: str) -> bytes:
        """A small blob's bytes; raises NotFoundError, or DataLossError for bad ones, which it drops."""
        path = self.blob_path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"blob {digest} is not here; push the engine again") from None
        except OSError as error:
            self.drop(digest)
            raise DataLossError(f"blob {digest} cannot be read ({error.strerror}); push it again") from None
        if digests.of_bytes(data) != digest:
            self.drop(digest)
            raise DataLossError(f"blob {digest} was changed on disk; push the engine again")
        return data

    def drop(self, digest: str) -> None:
        """Takes away a blob that is bad. An engine that runs keeps the file that it has: its name is a link.

        What is brought in its place is a new file, which `link` gives to the engine's next start.
        """
        # On a disk that is read-only by now it stays, and is found again.
        with contextlib.suppress(OSError):
            self.blob_path(digest).unlink()

    def verify(self, manifest: EngineManifest) -> None:
        """Reads every byte of an engine.

        Raises NotFoundError or DataLossError, which name the file, and drops what is bad.
        """
        for layer in manifest.layers:
            why = "was changed on disk"
            try:
                found = digests.of_file(self.blob_path(layer.digest))
            except FileNotFoundError:
                raise NotFoundError(
                    f"{layer.title} ({layer.digest}) is not here; push the engine again"
                ) from None
            except OSError as error:
                found, why = "", f"cannot be read ({error.strerror})"
            if found != layer.digest:
                self.drop(layer.digest)
                raise DataLossError(f"{layer.title} {why}; push the engine again")

    def link(self, manifest: EngineManifest) -> Path:
        """A directory with the engine's files by their titles.

        Raises NotFoundError, StoreError or TooLargeError.

        Programs that have files of an earlier directory open keep them.
        """
        for layer in manifest.layers:
            if not self.has(layer.digest):
                raise NotFoundError(f"{layer.title} ({layer.digest}) is not here; push the engine again")
        directory = self._engines / digests.hex_of(manifest.digest)
        building = directory.with_suffix(".new")
        with self._changing(building):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            for layer in manifest.layers:
                os.link(self.blob_path(layer.digest), building / layer.title)
            sync_directory(building)
            shutil.rmtree(directory, ignore_errors=True)
            building.rename(directory)
            sync_directory(self._engines)
        return directory

    def collect(self, engines: Collection[EngineManifest]) -> int:
        """Removes all that none of these engines needs; returns the bytes that came free.

        Raises StoreError.
        """
        keep = {digests.hex_of(m.digest) for m in engines}
        with self._changing(self.blobs):
            for directory in self._engines.iterdir():
                if directory.name not in keep:
                    shutil.rmtree(directory, ignore_errors=True)
            keep |= {digests.hex_of(b.digest) for m in engines for b in m.blobs()}
            keep |= {digests.hex_of(d) for d in self._writing}
            freed = 0
            for path in (*self.blobs.iterdir(), *self._ingests.iterdir()):
                if path.name not in keep:
                    freed += path.stat().st_size if path.parent == self.blobs else taken_bytes(path)
                    path.unlink()
        return freed

    def free_bytes(self) -> int:
        """Disk space that blobs may still take: what is free, less what is promised and what is spare."""
        return self._space.free_bytes()

    @contextlib.contextmanager
    def _changing(self, path: Path, needed_bytes: int = 0) -> Iterator[None]:
        """Turns what the disk may do into StoreError or TooLargeError."""
        try:
            with writing(path):
                yield
        except OSError:
            raise TooLargeError(
                "the disk of the engine store is full", needed_bytes, self.free_bytes()
            ) from None
