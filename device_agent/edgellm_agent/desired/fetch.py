"""Brings an engine from a source into the store; what was fetched before stays, and is gone on from."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from edgellm.bundle import digest as digests
from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import Descriptor, EngineManifest
from edgellm_agent.desired.base import BlobSource, RangeError, SourceError, WrongBytesError
from edgellm_agent.desired.http import FileAddresses, HttpSource, new_client
from edgellm_agent.desired.oci import RegistryAddresses, SourceCredentials
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.desired.sources import AllowList, Source
from edgellm_agent.errors import AgentError, DataLossError, TooLargeError
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.origin import Origin
from edgellm_agent.store import Ingest
from edgellm_agent.threads import in_thread

_PARALLEL_BLOBS = 2


@asynccontextmanager
async def open_source(settings: DesiredSettings, source: Source) -> AsyncGenerator[BlobSource, None]:
    """A connection to a source that is on the allow-list; raises SourceError."""
    try:
        client = await asyncio.to_thread(new_client, settings)
    except OSError as error:  # ssl.SSLError is one
        raise SourceError(f"ca_file {settings.ca_file}: {error}", permanent=True) from None
    addresses = RegistryAddresses(source) if source.registry else FileAddresses(source)
    credentials = SourceCredentials(source, AllowList(settings.sources), settings.credentials_file)
    async with client:
        yield HttpSource(client, addresses, credentials, settings.stall_s)


class Fetcher:
    """Fetches one engine; an attempt that failed may be followed by another.

    Args:
        manager: Says whether the engine can run here, and owns the store.
        source: Where it is.
        digest: Its name.
        by: Who asked for it.
        max_bytes_per_s: Most to take of the network; None: no limit.
    """

    def __init__(
        self, manager: EngineManager, source: BlobSource, digest: str, by: Origin, max_bytes_per_s: int | None
    ) -> None:
        self._manager = manager
        self._source = source
        self._digest = digest
        self._by = by
        self._pace = Pace(max_bytes_per_s)
        self._manifest: EngineManifest | None = None

    def progress(self) -> tuple[int, int]:
        """Bytes of the engine that are on the device, and all of them; zeros before the manifest is here."""
        if self._manifest is None:
            return 0, 0
        missing = self._manager.store.missing(self._manifest.blobs())
        total = self._manifest.size_bytes
        return total - sum(max(0, blob.size_bytes - offset) for blob, offset in missing), total

    async def fetch(self) -> None:
        """Fetches what is missing and registers the engine as whole.

        If the disk is too full, engines that the fleet brought before make way.

        Raises SourceError; PreconditionError, DoesNotFitError, TooLargeError or BundleError, before a blob is
        fetched, for an engine that cannot run here; ConflictError if a push is just bringing the same blob.
        """
        manifest = await self._read_manifest()
        config = await self._read_config(manifest)
        attestations = await self._read_attestations(manifest, config)
        try:
            self._manager.prepare(manifest, config, attestations=attestations)
        except TooLargeError:
            self._make_room(manifest)
            self._manager.prepare(manifest, config, attestations=attestations)
        self._manager.begin_push(manifest, config, attestations=attestations)
        self._manager.registry.mark_fetched(self._digest)
        self._manifest = manifest
        slots = asyncio.Semaphore(_PARALLEL_BLOBS)
        missing = [blob for blob, _ in self._manager.store.missing(manifest.blobs())]
        tasks = [asyncio.create_task(self._fetch_blob(blob, slots)) for blob in missing]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._manager.commit_push(self._digest, self._by)

    def _make_room(self, manifest: EngineManifest) -> None:
        """Removes engines that the fleet brought before, oldest first, until this one has disk space.

        First those of which only a part has come: nobody wants them any more.
        """
        manager, store = self._manager, self._manager.store

        def lacking_bytes() -> int:
            return store.lacking_bytes(manifest.blobs()) - store.free_bytes()

        whole = {engine.digest for engine in manager.engines()}
        kept = {*manager.needed(), self._digest}
        for digest in manager.registry.fetched():
            if digest not in kept | whole:
                manager.remove(digest, self._by)
        sizes = {engine.digest: engine.manifest.size_bytes for engine in manager.engines()}
        removable = [d for d in manager.registry.fetched() if d in sizes and d not in kept]
        if lacking_bytes() > sum(sizes[digest] for digest in removable):
            return  # It would not fit all the same: what there is to go back to stays.
        for digest in removable:
            if lacking_bytes() <= 0:
                return
            manager.remove(digest, self._by)

    async def _read_manifest(self) -> EngineManifest:
        store = self._manager.store
        with contextlib.suppress(AgentError):
            return EngineManifest.parse(store.read(self._digest))
        for _ in range(2):
            data = await self._source.manifest(self._digest)
            if digests.of_bytes(data) == self._digest:
                return EngineManifest.parse(data)
        raise SourceError(
            f"what came as the manifest does not have the digest {self._digest}", permanent=True
        )

    async def _read_attestations(self, manifest: EngineManifest, config: EngineConfig) -> list[bytes]:
        """What the source has, as far as a device would keep it: no more than a push may bring."""
        kept: list[bytes] = []
        async with contextlib.aclosing(self._source.attestations(self._digest)) as found:
            async for envelope in found:
                kept = self._manager.trust.retained(manifest, config, kept, [envelope])
        return kept

    async def _read_config(self, manifest: EngineManifest) -> EngineConfig:
        """The manifest's descriptor bounds the config's size."""
        blob = manifest.config
        with contextlib.suppress(AgentError):
            return manifest.parse_config(self._manager.store.read(blob.digest))
        for _ in range(2):
            data = bytearray()
            with contextlib.suppress(WrongBytesError):
                async with self._source.blob(blob, 0) as pieces:
                    async for piece in pieces:
                        data += piece
                        if len(data) > blob.size_bytes:
                            break
            if digests.of_bytes(bytes(data)) == blob.digest:
                return manifest.parse_config(bytes(data))
        raise SourceError(
            f"what came as the engine config does not have the digest {blob.digest}", permanent=True
        )

    async def _fetch_blob(self, blob: Descriptor, slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                await self._transfer(blob)
            except (DataLossError, WrongBytesError):
                # What an earlier attempt left may be to blame: once more, from the first byte.
                try:
                    await self._transfer(blob, from_zero=True)
                except (DataLossError, WrongBytesError) as error:
                    raise SourceError(str(error), permanent=True) from None

    async def _transfer(self, blob: Descriptor, *, from_zero: bool = False) -> None:
        store = self._manager.store
        begin = partial(store.ingest, blob, store.status(blob.digest))
        ingest = await in_thread(begin, undo=Ingest.close)
        try:
            if from_zero:
                await in_thread(ingest.restart)
            try:
                await self._receive(blob, ingest)
            except RangeError:
                await in_thread(ingest.restart)
                await self._receive(blob, ingest)
            await in_thread(ingest.commit)
        finally:
            ingest.close()

    async def _receive(self, blob: Descriptor, ingest: Ingest) -> None:
        if ingest.offset_bytes >= blob.size_bytes:
            return
        async with self._source.blob(blob, ingest.offset_bytes) as pieces:
            async for piece in pieces:
                if ingest.offset_bytes + len(piece) > blob.size_bytes:
                    raise WrongBytesError(f"{blob.digest}: more came than {blob.size_bytes:,} bytes")
                await self._pace.take(len(piece))
                await in_thread(partial(ingest.write, piece))
        if ingest.offset_bytes < blob.size_bytes:
            raise SourceError(f"{blob.digest} ended at {ingest.offset_bytes:,} of {blob.size_bytes:,} bytes")


class Pace:
    """Shares a bound on bytes per second between transfers."""

    def __init__(self, max_bytes_per_s: int | None) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Waits until so many bytes may have come."""
        if self._max_bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + count / self._max_bytes_per_s
        await asyncio.sleep(self._free_at - now)
