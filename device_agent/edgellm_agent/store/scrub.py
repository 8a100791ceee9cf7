"""Reads every blob again, slowly, so that bytes that have changed on disk are found before they are needed.

A byte that goes bad is found, at the latest, after the interval and the time of one reading: with the
defaults 24 hours and 2 minutes for each gigabyte of engines.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import mmap
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from edgellm.bundle.manifest import EngineManifest
from edgellm_agent.store.blobs import Store
from edgellm_agent.store.settings import StoreSettings
from edgellm_agent.threads import in_thread

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_HOUR_S = 3600.0

OnBad = Callable[[str], None]
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Scrubbed:
    """What one reading came to; `bad` are digests of blobs that were dropped."""

    blobs: int
    read_bytes: int
    bad: tuple[str, ...]


class Scrubber:
    """Reads the store again and again in the background.

    Args:
        store: Whose blobs are read.
        settings: How often, and how fast.
        manifests: The engines that are here now, asked before each reading.
        on_bad: Told the digest of each blob that was bad and is dropped, so that it can be brought again.
        sleep: Time passes by it; tests have their own.
    """

    def __init__(
        self,
        store: Store,
        settings: StoreSettings,
        manifests: Callable[[], Iterable[EngineManifest]],
        on_bad: OnBad,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._store = store
        self._settings = settings
        self._manifests = manifests
        self._on_bad = on_bad
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None
        self.last: Scrubbed | None = None

    def start(self) -> None:
        """Begins, unless the settings say never."""
        if self._settings.scrub_interval_h > 0:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops, in the middle of a blob if need be."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def scrub(self) -> Scrubbed:
        """Reads all blobs of all engines once."""
        digests = {d for m in self._manifests() for d in (m.digest, *(b.digest for b in m.blobs()))}
        read_bytes, bad = 0, []
        for digest in sorted(digests):
            count, is_bad = await self._read(digest)
            read_bytes += count
            if is_bad:
                log.error("store.blob_bad digest=%s: it has changed on disk and is dropped", digest)
                bad.append(digest)
                # Told first: a power cut between the two leaves a bad file, which is found again.
                self._on_bad(digest)
                self._store.drop(digest)
        self.last = Scrubbed(len(digests), read_bytes, tuple(bad))
        log.info("store.scrubbed blobs=%d bytes=%d bad=%d", len(digests), read_bytes, len(bad))
        return self.last

    async def _read(self, digest: str) -> tuple[int, bool]:
        """Bytes read of a blob, and whether it is bad; one that is not here, or no longer, is not."""
        path = self._store.blob_path(digest)
        try:
            blob = await in_thread(lambda: _BlobReader(path), undo=_BlobReader.close)
        except OSError as error:
            return 0, error.errno == errno.EIO
        try:
            await self._read_slowly(blob)
            return blob.read_bytes, blob.digest != digest and blob.is_current()
        except OSError as error:
            log.warning("store.unreadable digest=%s: %s", digest, error)
            return blob.read_bytes, True
        finally:
            blob.close()

    async def _read_slowly(self, blob: _BlobReader) -> None:
        while True:
            began_s = time.monotonic()
            count = await in_thread(blob.read_some)
            if not count:
                return
            # Time that was lost is not made up for.
            due_s = count / self._settings.scrub_bytes_per_s - (time.monotonic() - began_s)
            await self._sleep(max(0.0, due_s))

    async def _run(self) -> None:
        await self._sleep(self._settings.scrub_first_h * _HOUR_S)
        while True:
            try:
                await self.scrub()
            except Exception:
                log.exception("store.scrub_failed")
            await self._sleep(self._settings.scrub_interval_h * _HOUR_S)


class _BlobReader:
    """Reads one blob from the disk itself: what the page cache holds may be better than what is left there,
    and what it holds of the running engine is not pushed out of it.

    Raises OSError, as its methods do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hasher = hashlib.sha256()
        # Of whole pages, as a read past the cache needs it.
        self._buffer = mmap.mmap(-1, _PIECE_BYTES)
        self._file = _open_uncached(path)
        self._stat = os.fstat(self._file)
        self.read_bytes = 0

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
        self._buffer.close()

    def read_some(self) -> int:
        """Reads and hashes the next piece; returns its bytes, 0 at the end."""
        if self.read_bytes >= self._stat.st_size:
            return 0
        count = os.readv(self._file, [self._buffer])
        with memoryview(self._buffer) as view:
            self._hasher.update(view[:count])
        self.read_bytes += count
        return count

    @property
    def digest(self) -> str:
        """Of what was read."""
        return "sha256:" + self._hasher.hexdigest()

    def is_current(self) -> bool:
        """Whether the file is still the blob, and not one in whose place another was brought meanwhile."""
        try:
            return os.path.samestat(self._path.stat(), self._stat)
        except FileNotFoundError:
            return False


def _open_uncached(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # A file system that reads through the cache only.
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return file
