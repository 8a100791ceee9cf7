"""Unpacks an engine: its files under their titles, every byte checked on the way, the whole at once or not
at all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgellm.bundle import Bundle, Layer, Variant
from edgellm.bundle import digest as digests
from edgellm.bundle.layout import OnProgress
from edgellm.errors import BundleError, DoesNotFitError

CONFIG_FILE = "engine.json"
"""The engine config, exactly the bytes that the manifest names."""
MANIFEST_FILE = "manifest.json"
"""The OCI manifest; its SHA-256 is the engine's digest."""


def export_directory(
    bundle: Bundle, variant: Variant, target: Path, on_progress: OnProgress | None = None
) -> None:
    """Writes the files of one engine, its config and its manifest into `target`, which is new or empty.

    Args:
        bundle: Where the blobs lie; each is read once, and its digest checked while it is copied.
        variant: The engine.
        target: Directory to make; its parents are made too.
        on_progress: Called with the bytes copied so far and the bytes in all.

    Raises:
        BundleError: The target is taken, a title is taken by a file of ours, or a blob is missing or changed.
        DoesNotFitError: The disk has no room for the files.
        OSError: The disk cannot be written.
    """
    with staged(target) as folder:
        write_engine(bundle, variant, folder, on_progress)


def write_engine(
    bundle: Bundle, variant: Variant, folder: Path, on_progress: OnProgress | None = None
) -> None:
    """Writes into a folder that is there already, and that the caller drops if this raises."""
    _check_titles(variant)
    layers = variant.manifest.layers
    total_bytes = sum(layer.size_bytes for layer in layers)
    _check_room(folder, total_bytes)
    done_bytes = 0

    def count(copied_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += copied_bytes
        if on_progress is not None:
            on_progress(done_bytes, total_bytes)

    for layer in layers:
        _copy(bundle.blob_path(layer.digest), layer, folder / layer.title, count)
    write_synced(folder / CONFIG_FILE, bundle.blob_path(variant.manifest.config.digest).read_bytes())
    write_synced(folder / MANIFEST_FILE, variant.manifest.to_json())
    variant.manifest.parse_config((folder / CONFIG_FILE).read_bytes())


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, which takes that name when the block ends well, and is dropped if not.

    Raises BundleError if there is something at `target`; an empty directory is replaced.
    """
    if target.is_symlink() or (target.exists() and not _is_empty(target)):
        raise BundleError(f"{target} is there already, and not an empty directory", "choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not made by tempfile: that one's directories are for their owner alone, and a server is another user.
    folder = target.parent / f".{target.name}.{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        yield folder
        # Fails if somebody put something at the target meanwhile: rename replaces an empty directory only.
        folder.rename(target)
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """A new file that a power cut leaves whole once the directory around it has its name."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, layer: Layer, target: Path, on_bytes: Callable[[int], None]) -> None:
    # The bundle's file was checked by name; what that name leads to by now must still be no link.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != layer.size_bytes:
            raise _damaged(layer, f"has {size_bytes:,} bytes instead of {layer.size_bytes:,}")
        found = digests.of_stream(reader, on_bytes, copy_to=writer)
        os.fsync(writer.fileno())
    if found != layer.digest:
        raise _damaged(layer, f"has changed: it is {found} now")


def _check_titles(variant: Variant) -> None:
    for layer in variant.manifest.layers:
        if layer.title in {CONFIG_FILE, MANIFEST_FILE}:
            raise BundleError(
                f"the engine has a file {layer.title}, a name that an export needs",
                "build the engine again with another name for that file",
            )


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise DoesNotFitError(
            f"{folder.parent} has {free_bytes:,} bytes free, and the engine {needed_bytes:,}",
            needed_bytes=needed_bytes,
            available_bytes=free_bytes,
            hint="free some space, or choose a path on another disk",
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(layer: Layer, what: str) -> BundleError:
    return BundleError(
        f"{layer.title} ({layer.digest}) {what}", "the bundle is damaged: build or fetch it again"
    )
