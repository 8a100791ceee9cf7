"""Where edgellm keeps its files: in EDGELLM_HOME if that is set, else where the platform says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs

_APPLICATION = "edgellm"
_LAST_BUILD = "last-build"


def config_dir() -> Path:
    """Directory of what the user said, as the known devices."""
    return _home() or platformdirs.user_config_path(_APPLICATION)


def data_dir() -> Path:
    """Directory of what was made, as built bundles."""
    return _home() or platformdirs.user_data_path(_APPLICATION)


def state_dir() -> Path:
    """Directory of what is remembered between runs."""
    return _home() or platformdirs.user_state_path(_APPLICATION)


def record_last_build(bundle: Path) -> None:
    """Remembers the bundle that was built last, for `edgellm push` and others; raises OSError."""
    write_atomically(state_dir() / _LAST_BUILD, os.fsencode(bundle.resolve()))


def last_build() -> Path | None:
    """The bundle that was built last on this machine, whether it is still there or not; None if none was."""
    try:
        return Path(os.fsdecode((state_dir() / _LAST_BUILD).read_bytes()))
    except FileNotFoundError:
        return None


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file: a reader, or a power cut, finds the old content or the new one; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _home() -> Path | None:
    home = os.environ.get("EDGELLM_HOME")
    return Path(home) if home else None
