"""The device's trust: its keys, what they stand for, and what was committed before.

Asked before an engine is copied and before one is activated. Not asked where the device goes back by itself:
at a restart, and when probation fails. An engine that was committed runs on, whatever expired or was revoked
meanwhile: a robot does not go dumb at boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import EngineManifest
from edgellm.signing.keys import PublicKey
from edgellm.signing.verification import Expected, judge, signers
from edgellm_agent.trust.base import Endorsement
from edgellm_agent.trust.clock import TrustedClock
from edgellm_agent.trust.keys import Keys, KnownKey, read_provisioned
from edgellm_agent.trust.retention import retained
from edgellm_agent.trust.settings import TrustSettings
from edgellm_agent.trust.store import TrustStore
from edgellm_agent.trust.verify import endorsement

log = logging.getLogger(__name__)

_TICK_S = 600.0


@dataclass(frozen=True)
class Held:
    """An engine that the device has, and what is attached to it."""

    digest: str
    attestations: Sequence[bytes]


class DeviceTrust:
    """Implements `base.Trust`. While the device knows no key it takes any engine, unless settings forbid.

    Once a key was trusted that is over for good: a device whose last key was revoked takes nothing new until
    it trusts another one.

    Args:
        settings: Provisioned keys.
        state_dir: Where `trust.db` is.
        profile: The board's, for which a release must be meant.
        wall_s: Wall clock, seconds since 1970.
        monotonic_s: A clock that nobody sets.
    """

    def __init__(
        self,
        settings: TrustSettings,
        state_dir: Path,
        profile: str,
        *,
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = TrustStore(state_dir / "trust.db")
        self._required = settings.required or settings.keys_dir is not None
        self._profile = profile
        self._keys = Keys(self._store, read_provisioned(settings.keys_dir))
        self._wall_s = wall_s
        self._clock = TrustedClock(
            self._store.floor_s(), self._store.keep_floor, wall_s=wall_s, monotonic_s=monotonic_s
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follows the clock from now on."""
        self._task = asyncio.create_task(self._follow_clock(), name="trusted-clock")

    async def close(self) -> None:
        """Keeps the time, and closes the database."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(sqlite3.Error):  # the disk may be full or read-only: nothing else is lost
            self._clock.now_s()
            self._clock.keep()
        self._store.close()

    def retained(
        self,
        manifest: EngineManifest,
        config: EngineConfig,
        stored: Sequence[bytes],
        arrived: Sequence[bytes],
    ) -> list[bytes]:
        """As in `base`."""
        return retained(stored, arrived, self._keys.ring(), self._expected(manifest, config))

    def admit(
        self,
        manifest: EngineManifest,
        config: EngineConfig,
        attestations: Sequence[bytes],
        *,
        proven: bool,
    ) -> Endorsement:
        """As in `base`."""
        keys = self._keys.ring()
        if not self._required and not keys.trusted and not keys.revoked:
            return Endorsement()
        expected = self._expected(manifest, config)
        oldest = 0 if proven else self._store.highest_release(config.name)
        return endorsement(judge(attestations, keys, expected), keys, expected, oldest)

    def committed(self, config: EngineConfig, endorsement: Endorsement) -> None:
        """As in `base`; what a trusted key has signed also says how late it is."""
        if endorsement.release:
            self._store.committed(config.name, endorsement.release)
        if endorsement.signed_by:
            self._clock.witness(endorsement.issued_s)

    def known_keys(self) -> list[KnownKey]:
        """All keys, revoked ones too."""
        return self._keys.all()

    def trust(self, key: PublicKey) -> KnownKey:
        """See `Keys.trust`."""
        known = self._keys.trust(key)
        log.info("trust.key_trusted name=%s id=%s", known.key.name, known.key.key_id)
        return known

    def revoke(self, name: str, engines: Callable[[], Iterable[Held]]) -> tuple[KnownKey, list[str]]:
        """See `Keys.revoke`; also the digests of those engines for which only this key stood."""
        revoked = self._keys.revoke(name, self._wall_s())
        trusted = self._keys.ring().trusted
        both = (*trusted, revoked.key)
        alone = [
            item.digest
            for item in engines()
            if signers(item.attestations, both, item.digest) == {revoked.key.key_id}
        ]
        log.warning("trust.key_revoked name=%s id=%s", revoked.key.name, revoked.key.key_id)
        return revoked, alone

    def _expected(self, manifest: EngineManifest, config: EngineConfig) -> Expected:
        return Expected(manifest.digest, config.name, self._profile, self._clock.now_s())

    async def _follow_clock(self) -> None:
        while self._task is not None:
            await asyncio.sleep(_TICK_S)
            try:
                self._clock.now_s()
            except sqlite3.Error as error:
                log.error("trust.time_not_kept %s", error)
