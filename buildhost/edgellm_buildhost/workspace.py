"""Where a build keeps what it would not like to do twice: a directory for each source, request and text.

It outlives an interrupted build and is removed behind a finished one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from edgellm import paths
from edgellm.errors import EdgellmError
from edgellm_buildhost.errors import BuildError, UnwantedError

_FORGOTTEN_S = 7 * 24 * 3600
_LOCK_FILE = "lock"
_REMOVED = ".removed"
_TRIES = 10


def key_of(facts: Mapping[str, object]) -> str:
    """A name for what decides the bytes of a quantized checkpoint, SHA-256 in hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """Of this package's sources: what another version left unfinished is not gone on with."""
    hasher = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        hasher.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


@contextmanager
def workspace(key: str) -> Iterator[Path]:
    """The directory of a build, alone; kept for another try when the block is interrupted, else removed.

    What others left a week ago is removed too. Raises BuildError when the same build is running already.
    """
    root = paths.data_dir() / "work"
    directory = root / key[:16]
    with _lock(directory):
        _forget_old(root, directory)
        try:
            yield directory
        except UnwantedError:
            raise  # another limit may let it pass
        except EdgellmError as error:
            # What is wrong with the source is wrong again; a disk that was full may have room next time.
            if not isinstance(error.__cause__, OSError):
                _remove(directory)
            raise
        _remove(directory)


def _lock(directory: Path) -> TextIO:
    """The directory, made and held until the file is closed; raises BuildError if another process has it."""
    for _ in range(_TRIES):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock = _held(directory)
        except FileNotFoundError:
            continue  # another process has just finished, and removed it
        except BlockingIOError:
            break
        if lock is not None:
            return lock
    raise BuildError(f"{directory}: another process makes the same build", "wait for it to end, or stop it")


def _held(directory: Path) -> TextIO | None:
    """Its lock, None if the directory was removed by whoever had it; raises what `flock` and `open` do."""
    path = directory / _LOCK_FILE
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except OSError:
        lock.close()
        raise
    lock.close()
    return None


def _remove(directory: Path) -> None:
    """At once, for whoever looks: a build that found half of it would take it for the whole."""
    removed = directory.with_name(directory.name + _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    directory.replace(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _forget_old(root: Path, used: Path) -> None:
    for directory in root.iterdir():
        if directory.name.endswith(_REMOVED):
            shutil.rmtree(directory, ignore_errors=True)
        elif directory != used:
            # Whoever works there may finish, and remove it, at any time.
            with suppress(FileNotFoundError, BlockingIOError):
                _forget(directory)


def _forget(directory: Path) -> None:
    if time.time() - _last_change(directory) <= _FORGOTTEN_S:
        return
    lock = _held(directory)
    if lock is not None:
        with lock:
            _remove(directory)


def _last_change(directory: Path) -> float:
    """Seconds since 1970."""
    return max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
