"""Changes what is attached to the engines of a bundle on disk; the engines themselves stay as they are.

New blobs first, then the index in one rename: a reader, or a power cut, finds the old attestations or the
new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgellm import paths
from edgellm.bundle import digest as digests
from edgellm.bundle import manifest as manifests
from edgellm.bundle import referrers
from edgellm.bundle.layout import BLOBS, INDEX_FILE, Bundle
from edgellm.bundle.manifest import Descriptor, Json
from edgellm.bundle.referrers import Referrer
from edgellm.bundle.writer import index_json
from edgellm.errors import BundleError


def attach(bundle: Bundle, digest: str, attestations: Sequence[bytes]) -> Bundle:
    """Replaces what is attached to an engine; returns the bundle as it is now.

    Raises BundleError for too many or too large attestations, OSError for a disk that cannot be written.
    """
    referrers.check_bounds(tuple(attestations))
    manifest = bundle.manifest(digest)
    subject = Descriptor(manifests.MANIFEST_MEDIA_TYPE, digest, len(manifest.raw))
    new = [Referrer.build(subject, envelope) for envelope in attestations]
    for data in (*attestations, *(item.raw for item in new), *([referrers.EMPTY] if new else [])):
        _write(bundle.path, data)
    before = _reachable(bundle)
    dropped = {item.descriptor.digest for item in bundle.referrers(digest)}
    old_lists = _write_index(bundle.path, dropped, [item.index_entry() for item in new])
    changed = Bundle.open(bundle.path)
    for left in (before | old_lists) - _reachable(changed):
        (bundle.path / BLOBS / digests.hex_of(left)).unlink(missing_ok=True)
    return changed


def _reachable(bundle: Bundle) -> set[str]:
    """Digests of the engines' blobs, of all that is attached, and of the lists that index.json names."""
    found = {digests.checked(entry.get("digest")) for entry in _read_list(bundle.path / INDEX_FILE)}
    for variant in bundle.variants:
        found |= {variant.digest, *(blob.digest for blob in variant.manifest.blobs())}
        for item in bundle.referrers(variant.digest):
            found |= {item.descriptor.digest, item.envelope.digest}
    return found


def _write_index(root: Path, dropped: set[str], added: list[Json]) -> set[str]:
    """Lists the new attestations where the engines are listed; returns the lists that are no longer used."""
    top = _read_list(root / INDEX_FILE)
    lists = [entry for entry in top if entry.get("mediaType") == manifests.INDEX_MEDIA_TYPE]
    kept = [entry for entry in top if entry not in lists and entry.get("digest") not in dropped]
    if not lists:
        paths.write_atomically(root / INDEX_FILE, index_json([*kept, *added]))
        return set()
    for number, entry in enumerate(lists):
        inner = _read_list(root / BLOBS / digests.hex_of(digests.checked(entry.get("digest"))))
        inner = [item for item in inner if item.get("digest") not in dropped]
        data = index_json([*inner, *(added if number == 0 else [])])
        kept.append({**entry, "digest": _write(root, data), "size": len(data)})
    paths.write_atomically(root / INDEX_FILE, index_json(kept))
    return {digests.checked(entry.get("digest")) for entry in lists}


def _read_list(path: Path) -> list[Json]:
    """Entries of an index that `Bundle.open` has checked a moment ago."""
    document = manifests.parse_json(path.read_bytes(), path.name, manifests.MAX_MANIFEST_BYTES)
    entries = document.get("manifests")
    if not isinstance(entries, list):
        raise BundleError(f"{path}: not an OCI image index", "build or fetch the bundle again")
    return entries


def _write(root: Path, data: bytes) -> str:
    digest = digests.of_bytes(data)
    path = root / BLOBS / digests.hex_of(digest)
    if not path.exists():
        paths.write_atomically(path, data)
        path.chmod(0o644)
    return digest
