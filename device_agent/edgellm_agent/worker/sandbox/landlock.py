"""Which files a process may open: Landlock, in kernels from 5.13 on that were built with it.

Rights are those of the kernel's UAPI (linux/landlock.h); a kernel says by its ABI version how many it knows.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEVICE = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
# How many rights over files each ABI version knows, from 1 on; later ones add none, so far.
_RIGHTS_COUNT = (13, 14, 15, 15, 16)
# From ABI 4 on: binding and connecting TCP; from 6 on: abstract sockets of, and signals to, others.
_NETWORK_ABI, _NETWORK = 4, 0b11
_SCOPES_ABI, _SCOPES = 6, 0b11

READ = _READ_FILE | _READ_DIR
RUN = READ | _EXECUTE
USE_DEVICE = READ | _WRITE_FILE | _IOCTL_DEVICE


@dataclass(frozen=True)
class Grant:
    """Rights over a file, or over all below a directory."""

    path: Path
    rights: int


def version() -> int:
    """The kernel's ABI version; raises OSError where it has no Landlock, or has it switched off."""
    return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))


def restrict(grants: Iterable[Grant]) -> int:
    """Leaves this thread, and all that it starts, no more than the grants; gives the ABI version.

    A path that does not exist is left out. TCP is refused altogether where the kernel can. Needs
    `no_new_privs`; raises OSError.
    """
    abi = version()
    known = (1 << _RIGHTS_COUNT[min(abi, len(_RIGHTS_COUNT)) - 1]) - 1
    attributes = struct.pack("=QQQ", known, _NETWORK, _SCOPES)
    attributes = attributes[: 24 if abi >= _SCOPES_ABI else 16 if abi >= _NETWORK_ABI else 8]
    ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for grant in grants:
            _add(ruleset, grant.path, grant.rights & known)
        _call(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return abi


def _add(ruleset: int, path: Path, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, parent)
        _call(_ADD_RULE, ruleset, ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(parent)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
