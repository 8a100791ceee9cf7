"""What a disk may do to us: errors in words, and what must be on it before we say that it is."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from edgellm_agent.errors import AgentError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_HINTS = {
    errno.EROFS: "mount it for writing, or choose another `state_dir`",
    errno.EACCES: "give it to the agent's user, or choose another `state_dir`",
    errno.EPERM: "give it to the agent's user, or choose another `state_dir`",
    errno.EIO: "the disk may be failing: see the kernel's log",
}


class StoreError(AgentError):
    """The disk does not do what a store needs: it is read-only, or fails."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into StoreError, in one sentence; a full disk is left to the caller."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        why = (error.strerror or str(error)).lower()
        hint = _HINTS.get(error.errno or 0, "see the agent's log")
        raise StoreError(f"the engine store cannot be written: {why} ({path}); {hint}") from error


def sync_directory(path: Path) -> None:
    """What the directory names, it names after a power cut too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(partial: Path, data: bytes, path: Path) -> None:
    """A small file that is under its name whole or not at all, whatever happens; `partial` comes first."""
    try:
        with partial.open("wb", buffering=0) as file:
            file.write(data)
            publish(file.fileno(), partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish(descriptor: int, partial: Path, path: Path) -> None:
    """Gives a written file its name, read-only.

    Bytes and mode are on disk before the name is, and the name is before this returns.
    """
    os.fchmod(descriptor, 0o440)
    os.fsync(descriptor)
    partial.rename(path)
    sync_directory(path.parent)


def check_writable(directory: Path) -> None:
    """Writes and removes a file; raises StoreError.

    Not os.access: it knows nothing of a disk that fails, and root may do everything.
    """
    probe = directory / ".probe"
    with writing(directory):
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            if error.errno not in FULL:
                raise
