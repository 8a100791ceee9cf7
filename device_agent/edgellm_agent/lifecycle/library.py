"""The engines on this device's disk: brought here piece by piece, whole, removed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import Descriptor, EngineManifest
from edgellm.errors import BundleError
from edgellm_agent.errors import AgentError, DataLossError, NotFoundError, PreconditionError
from edgellm_agent.lifecycle.journal import Journal
from edgellm_agent.origin import LOCAL
from edgellm_agent.registry import EngineRow
from edgellm_agent.store import Store

log = logging.getLogger(__name__)

_FORGET_PUSH_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class StoredEngine:
    """An engine in the store."""

    digest: str
    manifest: EngineManifest
    config: EngineConfig
    added_at: float


class Library:
    """What the registry says of engines, together with their blobs."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self._store = store
        self._journal = journal
        self._registry = journal.registry
        self._known_damaged: set[str] = set()

    def begin(self, manifest: EngineManifest, config: EngineConfig, attestations: Sequence[bytes]) -> None:
        """An engine is on its way; from now on the garbage collector leaves its blobs alone.

        The attestations replace those that were kept before.
        """
        self._store.put(manifest.to_json())
        with self._registry.together():
            self._registry.begin_push(manifest.digest, config.name, time.time())
            self._registry.set_attestations(manifest.digest, attestations)
        self._store.put(config.to_json())

    def whole(self, digest: str) -> StoredEngine:
        """The engine, all of whose blobs must be here by now; raises NotFoundError or PreconditionError."""
        row = next((row for row in self._registry.engines() if row.digest == digest), None)
        if row is None:
            raise NotFoundError(f"no push of {digest} was prepared")
        manifest = EngineManifest.parse(self._store.read(digest))
        missing = self._store.missing(manifest.blobs())
        if missing:
            raise PreconditionError(f"{len(missing)} blobs of {digest} are missing; go on with the push")
        config = manifest.parse_config(self._store.read(manifest.config.digest))
        return StoredEngine(digest, manifest, config, row.changed_at)

    def end(self, digest: str) -> None:
        """The engine is whole, and can be activated."""
        self._registry.end_push(digest, time.time())
        self._known_damaged.discard(digest)

    def has(self, digest: str) -> bool:
        """Whether the engine is here and none of its blobs is missing."""
        try:
            return not self._store.missing(self.find(digest).manifest.blobs())
        except AgentError:
            return False

    async def verify(self, stored: StoredEngine) -> None:
        """Reads every byte; raises NotFoundError or DataLossError, and drops what is bad."""
        try:
            await asyncio.to_thread(self._store.verify, stored.manifest)
        except (DataLossError, NotFoundError) as error:
            self._damaged(stored.digest, str(error))
            raise

    def damaged(self, blob: str) -> None:
        """A blob on the disk was not what it should be, and was dropped: whose it was is told."""
        for row in self._registry.engines():
            manifest = self._manifest(row.digest)
            digests = [] if manifest is None else [found.digest for found in manifest.blobs()]
            if blob in {row.digest, *digests}:
                self._damaged(row.digest, f"{blob} was changed on disk and dropped")

    def _damaged(self, digest: str, error: str) -> None:
        # Once: it is found again at each look, until the engine is whole again.
        if digest in self._known_damaged:
            return
        self._known_damaged.add(digest)
        try:
            with self._journal.entry("DAMAGED", digest, LOCAL, error=error):
                pass
        except sqlite3.Error as unwritten:
            log.error("engine.not_written what=DAMAGED engine=%s: %s", digest, unwritten)

    def engines(self) -> list[StoredEngine]:
        """The engines that are whole, oldest first; one that can no longer be read is left out."""
        return [e for row in self._registry.engines() if row.ready and (e := self._stored(row))]

    def find(self, name: str) -> StoredEngine:
        """An engine by digest, or by a name that only one has; raises NotFoundError or PreconditionError."""
        found = [e for e in self.engines() if name in (e.digest, e.config.name)]
        if not found:
            raise NotFoundError(
                f"no engine {name!r} on this device; `edgellm engine list` shows what there is"
            )
        if len(found) > 1:
            raise PreconditionError(f"{len(found)} engines are named {name!r}; use the digest")
        return found[0]

    def expected_blob(self, digest: str, size_bytes: int) -> Descriptor:
        """A blob of an engine that is here or on its way; others would fill the disk unasked.

        Raises PreconditionError.
        """
        for row in self._registry.engines():
            manifest = self._manifest(row.digest)
            if manifest and any((b.digest, b.size_bytes) == (digest, size_bytes) for b in manifest.blobs()):
                return Descriptor("", digest, size_bytes)
        raise PreconditionError(
            f"no engine here, and no prepared push, has a blob {digest} of {size_bytes} bytes"
        )

    def forget_old_pushes(self) -> int:
        """Drops what has come of engines that nobody went on with for a week; returns the freed bytes."""
        self._registry.forget_pushes_before(time.time() - _FORGET_PUSH_S)
        return self.collect()

    def collect(self) -> int:
        """Removes blobs that no engine needs; returns the bytes that came free.

        While a manifest cannot be read, nobody knows which blobs are its own, and all stay.
        """
        manifests = self.manifests()
        if len(manifests) < len(self._registry.engines()):
            return 0
        freed = self._store.collect(manifests)
        if freed:
            log.info("garbage collection freed %d bytes", freed)
        return freed

    def manifests(self) -> Collection[EngineManifest]:
        """Of all engines, those on their way included."""
        return [m for row in self._registry.engines() if (m := self._manifest(row.digest))]

    def _stored(self, row: EngineRow) -> StoredEngine | None:
        manifest = self._manifest(row.digest)
        if manifest is None:
            return None
        try:
            config = manifest.parse_config(self._store.read(manifest.config.digest))
        except (AgentError, BundleError) as error:
            log.error("engine %s: %s", row.digest, error)
            return None
        return StoredEngine(row.digest, manifest, config, row.changed_at)

    def _manifest(self, digest: str) -> EngineManifest | None:
        try:
            return EngineManifest.parse(self._store.read(digest))
        except (DataLossError, BundleError) as error:
            self._damaged(digest, str(error))
        except AgentError as error:
            log.error("engine %s: %s", digest, error)
        return None
