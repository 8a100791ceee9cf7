"""Which user of this machine is at the other end of a Unix socket, and in which role."""

from __future__ import annotations

import grp
import logging
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.errors import DeniedError

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("3i")
# <asm-generic/socket.h>; Python has no name for it. Linux 4.13 and later.
_SO_PEERGROUPS = 59
# Python reads at most so many bytes of an option: 256 groups.
_MAX_GROUPS_BYTES = 1024


@dataclass(frozen=True)
class Peer:
    """A process, as the kernel knew it when it connected."""

    uid: int
    gid: int
    pid: int
    groups: frozenset[int] = frozenset()
    """The supplementary ones, which systemd and containers may give to a process alone."""


class NoRoleError(DeniedError):
    """A user who stands in no list."""

    hint = "ask whoever runs the device for a role: [access] in its settings"

    def __init__(self, who: str) -> None:
        super().__init__(f"{who} has no role on this device")
        self.who = who


def read_peer(connection: socket.socket) -> Peer:
    """Who connected; raises OSError."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(packed)
    return Peer(uid, gid, pid, _read_groups(connection))


def _read_groups(connection: socket.socket) -> frozenset[int]:
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS_BYTES)
    except OSError as error:
        # Without them somebody may have less rights, never more.
        log.warning("access.groups_unknown error=%s", error)
        return frozenset()
    return frozenset(number for (number,) in struct.iter_unpack("I", packed))


class Users:
    """Roles of this machine's users. Names are looked up once: no connection waits for a directory."""

    def __init__(self, settings: AccessSettings, own_uid: int | None = None) -> None:
        lists = (
            (Role.ADMIN, settings.admins),
            (Role.OPERATOR, settings.operators),
            (Role.APP, settings.apps),
            (Role.VIEWER, settings.viewers),
        )
        configured = settings.model_fields_set
        self._by_uid: dict[int, Role] = {}
        self._by_gid: dict[int, Role] = {}
        for role, entries in lists:
            for entry in entries:
                self._add(role, entry, warn=f"{role}s" in configured)
        for uid in (0, os.geteuid() if own_uid is None else own_uid):
            self._by_uid[uid] = Role.ADMIN
        self._others = None if settings.others == "none" else Role[settings.others.upper()]

    def caller(self, peer: Peer) -> Caller:
        """Raises DeniedError for a user without a role."""
        name = f"uid {peer.uid}"
        role = max(self._roles(peer), default=self._others)
        if role is None:
            raise NoRoleError(name)
        return Caller(name, role)

    def is_admin(self, uid: int) -> bool:
        """Whether the user is one whatever groups it is in."""
        return self._by_uid.get(uid) is Role.ADMIN

    def _roles(self, peer: Peer) -> Iterable[Role]:
        if peer.uid in self._by_uid:
            yield self._by_uid[peer.uid]
        for gid in {peer.gid, *peer.groups} & self._by_gid.keys():
            yield self._by_gid[gid]

    def _add(self, role: Role, entry: str, *, warn: bool) -> None:
        name = entry.removeprefix("@")
        by_id = self._by_gid if entry.startswith("@") else self._by_uid
        try:
            number = int(name) if name.isdecimal() else _number(entry)
        except KeyError:
            if warn:
                log.warning("access.unknown_name role=%s entry=%s", role, entry)
            return
        # The lists come highest role first.
        by_id.setdefault(number, role)


def _number(entry: str) -> int:
    """Raises KeyError."""
    if entry.startswith("@"):
        return grp.getgrnam(entry[1:]).gr_gid
    return pwd.getpwnam(entry).pw_uid
