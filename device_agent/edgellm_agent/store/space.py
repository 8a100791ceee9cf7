"""Disk space for blobs that are on their way, reserved before their first byte.

The file of a blob gets its blocks from the file system at once, beyond its end: its length stays the offset
to go on from, and nobody else can take the space. A file system that cannot do that leaves a promise in this
process instead, so that at least two pushes are not promised the same space.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from edgellm_agent.errors import TooLargeError
from edgellm_agent.store.disk import writing

_KEEP_SIZE = 1
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Space:
    """Hands out the disk's space; safe to use from several threads.

    Args:
        directory: On the file system.
        spare_bytes: What is left to others.
    """

    def __init__(self, directory: Path, spare_bytes: int) -> None:
        self._directory = directory
        self._spare_bytes = spare_bytes
        # File → bytes that it will have. A promise ends with its file.
        self._promised: dict[Path, int] = {}
        self._lock = threading.Lock()

    def reserve(self, sizes: Mapping[Path, int]) -> None:
        """Reserves space for files, each with the bytes that it will have; what it has already counts.

        Raises TooLargeError, or StoreError, and then nothing more is reserved than before.
        """
        with self._lock:
            wanted = {path: size for path, size in sizes.items() if lacking_bytes(path, size)}
            needed = sum(lacking_bytes(path, size) for path, size in wanted.items())
            free = self._free_bytes(besides=wanted)
            if needed > free:
                raise _too_large(needed, free)
            try:
                _allocate_all(wanted)
            except OSError:  # Somebody else was faster.
                raise _too_large(needed, self._free_bytes(besides=wanted)) from None
            self._promised |= wanted

    def free_bytes(self) -> int:
        """Bytes that may still be reserved."""
        with self._lock:
            return self._free_bytes(besides={})

    def _free_bytes(self, besides: Mapping[Path, int]) -> int:
        self._promised = {path: size for path, size in self._promised.items() if path.exists()}
        promised = sum(lacking_bytes(p, size) for p, size in self._promised.items() if p not in besides)
        return max(0, shutil.disk_usage(self._directory).free - self._spare_bytes - promised)


def lacking_bytes(path: Path, size_bytes: int) -> int:
    """What a file that will have `size_bytes` has no space for yet."""
    try:
        return max(0, size_bytes - taken_bytes(path))
    except FileNotFoundError:
        return size_bytes


def taken_bytes(path: Path) -> int:
    """What a file takes of the disk, reserved blocks beyond its end included; raises FileNotFoundError."""
    stat = path.stat()
    return max(stat.st_size, stat.st_blocks * _BLOCK_BYTES)


def _too_large(needed: int, free: int) -> TooLargeError:
    return TooLargeError(
        f"{needed:,} bytes are missing, {free:,} are free on the device's disk", needed, free
    )


def _allocate_all(sizes: Mapping[Path, int]) -> None:
    """All or none; raises StoreError, or OSError where the disk is full."""
    begun: list[tuple[Path, bool]] = []
    try:
        for path, size in sizes.items():
            begun.append((path, path.exists()))
            with writing(path.parent), path.open("ab", buffering=0) as file:
                _allocate(file.fileno(), size)
    except BaseException:
        for path, existed in begun:
            with contextlib.suppress(OSError):
                _give_back(path, existed=existed)
        raise


def _allocate(descriptor: int, size_bytes: int) -> None:
    while _libc.fallocate(descriptor, _KEEP_SIZE, 0, size_bytes) != 0:
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _give_back(path: Path, *, existed: bool) -> None:
    if not existed:
        path.unlink(missing_ok=True)
    elif taken_bytes(path) > (length := path.stat().st_size):
        # To its own length: that frees what lies beyond.
        os.truncate(path, length)
