"""What a process gives up for good: privileges it could gain or has, and sizes it could use."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapabilityData(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def gain_none() -> None:
    """No program that this process runs may have more rights than it has; raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Gives up root's powers, where there are any; raises OSError."""
    # Below systemd there are none, and the call itself is refused.
    if not _has_capabilities():
        return
    for capability in range(_last_capability() + 1):
        _prctl(_PR_CAPBSET_DROP, capability)
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    nothing = (_CapabilityData * 2)()
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)))


def bound_files() -> None:
    """No file may be written through a descriptor, and none is left by a crash."""
    # Python ignores SIGXFSZ: a write fails with EFBIG. Pipes, sockets and devices are not files here.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hide_memory() -> None:
    """Other processes of the same user may not read this one's memory: the worker not the agent's.

    For the agent, not for the worker: with ProtectProc=invisible the agent would not see how large a worker
    is that hides so. Raises OSError.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def _has_capabilities() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    return any(line.startswith(("CapPrm:", "CapInh:")) and int(line.split()[1], 16) for line in lines)


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def _prctl(option: int, value: int) -> None:
    unused = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), unused, unused, unused))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
