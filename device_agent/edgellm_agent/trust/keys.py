"""The keys that a device knows: provisioned in a folder of the settings, or trusted and revoked since."""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from edgellm.signing.errors import SigningError
from edgellm.signing.keys import PublicKey, read_public_key
from edgellm.signing.verification import Keyring
from edgellm_agent.errors import InvalidError, NotFoundError, PreconditionError
from edgellm_agent.trust.store import KeyRow, TrustStore

log = logging.getLogger(__name__)

MAX_KEYS = 64
_SUFFIXES = (".json", ".pem")


@dataclass(frozen=True)
class KnownKey:
    """A key, and how this device came to it; times are seconds since 1970."""

    key: PublicKey
    provisioned: bool
    revoked_at_s: float | None


class Keys:
    """Both kinds as one list. What was revoked stays revoked, whatever file or call brings it again."""

    def __init__(self, store: TrustStore, provisioned: list[PublicKey]) -> None:
        self._store = store
        self._provisioned = {key.key_id: key for key in provisioned}

    def all(self) -> list[KnownKey]:
        """Provisioned ones first; what their files say counts for them."""
        rows = {row.key.key_id: row for row in self._store.rows()}
        found = [_known(key, rows.pop(key.key_id, None)) for key in self._provisioned.values()]
        return [*found, *(KnownKey(row.key, False, row.revoked_at_s) for row in rows.values())]

    def ring(self) -> Keyring:
        """For judging."""
        known = self.all()
        return Keyring(
            trusted=tuple(item.key for item in known if item.revoked_at_s is None),
            revoked=tuple(item.key for item in known if item.revoked_at_s is not None),
        )

    def trust(self, key: PublicKey) -> KnownKey:
        """Trusts a key from now on; a trusted one gets the new name and validity.

        Raises PreconditionError for a revoked key, for one whose file says what it is, and for too many.
        """
        known = {item.key.key_id: item for item in self.all()}
        before = known.get(key.key_id)
        if before is not None and before.revoked_at_s is not None:
            raise PreconditionError(
                f"the key {before.key.name} ({key.short_id}) was revoked here and is never trusted again;"
                " make a new one with `edgellm key generate`"
            )
        if before is not None and before.provisioned:
            if before.key == key:
                return before
            raise PreconditionError(
                f"{before.key.name} ({key.short_id}) is provisioned: change its file in trust.keys_dir"
            )
        if before is None and sum(item.revoked_at_s is None for item in known.values()) >= MAX_KEYS:
            raise PreconditionError(f"{MAX_KEYS} keys are trusted already; revoke one that is not needed")
        self._store.trust(key)
        return KnownKey(key, False, None)

    def revoke(self, name: str, now_s: float) -> KnownKey:
        """Ends the trust in a key, by its id or by a name that only one has.

        Raises InvalidError, NotFoundError or PreconditionError.
        """
        found = self._find(name)
        self._store.revoke(found.key, now_s)
        return next(item for item in self.all() if item.key.key_id == found.key.key_id)

    def _find(self, name: str) -> KnownKey:
        if not name:
            raise InvalidError("key", "is empty; give a key id or a name")
        known = self.all()
        found = [item for item in known if item.key.key_id == name] or [
            item for item in known if item.key.name == name
        ]
        if not found:
            there_is = ", ".join(item.key.name for item in known) or "none"
            raise NotFoundError(f"no key {name!r:.80} on this device; known: {there_is}")
        if len(found) > 1:
            ids = ", ".join(item.key.key_id for item in found)
            raise PreconditionError(f"{len(found)} keys are named {name!r}; use the key id: {ids}")
        return found[0]


def read_provisioned(directory: Path | None) -> list[PublicKey]:
    """The keys in a folder; one that cannot be read, or that others may change, is logged and left out.

    The agent starts all the same: with fewer keys it takes fewer engines, never more.
    """
    if directory is None:
        return []
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES)
    except OSError as error:
        log.error("trust.keys_dir %s cannot be read: %s", directory, error.strerror)
        return []
    if len(paths) > MAX_KEYS:
        log.error("trust.keys_dir has %d files; the first %d count", len(paths), MAX_KEYS)
    found: dict[str, PublicKey] = {}
    for key in (_read(path) for path in paths[:MAX_KEYS]):
        if key is not None:
            found.setdefault(key.key_id, key)
    return list(found.values())


def _read(path: Path) -> PublicKey | None:
    try:
        _check_owner(path)
        return read_public_key(path)
    except (SigningError, OSError) as error:
        log.error("trust.key_ignored %s: %s", path, error)
        return None


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in {0, os.geteuid()}:
        raise SigningError(f"{path} can be changed by others than root and the agent", f"chmod 644 {path}")


def _known(key: PublicKey, row: KeyRow | None) -> KnownKey:
    return KnownKey(key, provisioned=True, revoked_at_s=None if row is None else row.revoked_at_s)
