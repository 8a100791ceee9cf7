"""Programs that see a small file system of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from edgellm_agent.store import Store
from edgellm_agent.store.settings import StoreSettings
from edgellm_agent.store.space import taken_bytes


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def small_disk(mount_point: Path, size: str, options: str = "") -> tuple[str, ...]:
    """What goes before a command so that it has a tmpfs of that size there; skips without user namespaces."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0:
        pytest.skip("needs user namespaces, for a small file system of its own")
    mount = f"mkdir -p {mount_point} && mount -t tmpfs -o size={size}{options} tmpfs {mount_point}"
    return ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")


def run_on(prefix: tuple[str, ...], code: str, *args: object) -> str:
    """What a Python program prints there."""
    command = [*prefix, sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def let_free(monkeypatch: pytest.MonkeyPatch, free_bytes: Callable[[], int]) -> None:
    """Has every disk have so much left for engines, beyond what a store leaves to others."""
    spare = StoreSettings().spare_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1 << 40, 0, max(0, free_bytes()) + spare))


def taken(store: Store) -> int:
    """What blobs and those on their way take of the disk, bytes."""
    return sum(taken_bytes(path) for path in store.blobs.parent.parent.rglob("*") if _counts(path))


def _counts(path: Path) -> bool:
    return path.is_file() and path.parent.name in {"sha256", "ingest"}
