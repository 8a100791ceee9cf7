"""Reads a bundle on disk: an OCI image layout whose index lists one manifest per variant of the engine."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.bundle import digest as digests
from edgellm.bundle import manifest as manifests
from edgellm.bundle import referrers
from edgellm.bundle.config import EngineConfig
from edgellm.bundle.manifest import Descriptor, EngineManifest, Json
from edgellm.bundle.referrers import Referrer
from edgellm.errors import BundleError

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
BLOBS = Path("blobs", "sha256")
LAYOUT_VERSION = "1.0.0"
# OCI lets an index name another one; two levels are what this layout and oras write.
_MAX_INDEX_DEPTH = 3
# Each may have 4 MiB; a bundle has one for each kind of board, and signatures.
_MAX_INDEX_BLOBS = 1024

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """One engine of the bundle: the files for one runtime, architecture or SM, and profile."""

    manifest: EngineManifest
    config: EngineConfig

    @property
    def digest(self) -> str:
        """Digest of the manifest: the engine's name everywhere."""
        return self.manifest.digest

    def __str__(self) -> str:
        """Says what the variant is for."""
        target = self.config.target
        return f"{self.config.runtime} {target.sm or target.architecture} {target.profile}"


class Bundle:
    """An opened bundle; every blob is checked against its digest before its content is used.

    Manifests and configs are read and checked by `open`; the files of the engine only by `verify`.
    """

    def __init__(
        self, path: Path, variants: tuple[Variant, ...], attached: tuple[Referrer, ...] = ()
    ) -> None:
        self.path = path
        self.variants = variants
        self._attached = attached

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Opens the bundle in a directory; raises BundleError, which says what is missing or wrong."""
        _check_layout(path)
        found = list(_manifests(path, _read_index(path), set()))
        engines = {item.digest: item for item in found if isinstance(item, EngineManifest)}
        attached = {item.descriptor.digest: item for item in found if isinstance(item, Referrer)}
        if not engines:
            raise BundleError(f"no engine in {path}", "check that this is an edgellm bundle")
        variants = (
            Variant(item, item.parse_config(_read(path, item.config, "config"))) for item in engines.values()
        )
        return cls(path, tuple(variants), tuple(attached.values()))

    def select(
        self, *, profile: str | None = None, architecture: str | None = None, runtime: str | None = None
    ) -> Variant:
        """The first variant that has what is asked for; None asks for nothing, files for "any" suit all.

        Raises:
            BundleError: There is none; the message lists what there is.
        """
        for variant in self.variants:
            target = variant.config.target
            if (
                profile in {None, target.profile}
                and (architecture is None or target.architecture in {"any", architecture})
                and runtime in {None, variant.config.runtime}
            ):
                return variant
        asked = " ".join(word for word in (runtime, architecture, profile) if word)
        there_is = "; ".join(str(variant) for variant in self.variants)
        raise BundleError(
            f"the bundle has no variant for {asked}", f"it has: {there_is}; build one for the device"
        )

    def variant(self, digest: str) -> Variant:
        """The variant with that manifest digest; raises BundleError."""
        for variant in self.variants:
            if variant.digest == digest:
                return variant
        raise BundleError(f"the bundle has no engine {digest}", "run `edgellm inspect` to see what it has")

    def manifest(self, digest: str) -> EngineManifest:
        """The manifest with that digest; raises BundleError."""
        return self.variant(digest).manifest

    def config(self, manifest: EngineManifest) -> EngineConfig:
        """The config that a manifest of this bundle names; raises BundleError."""
        return self.variant(manifest.digest).config

    def referrers(self, digest: str) -> tuple[Referrer, ...]:
        """What is attached to an engine."""
        return tuple(item for item in self._attached if item.subject == digest)

    def attestations(self, digest: str) -> tuple[bytes, ...]:
        """The envelopes that are attached to an engine, unread; raises BundleError, also for too many."""
        attached = self.referrers(digest)
        if len(attached) > referrers.MAX_ATTESTATIONS:
            raise BundleError(
                f"{len(attached)} attestations of one engine, more than {referrers.MAX_ATTESTATIONS}",
                "a registry piles up those of all builds: build the bundle again, or copy it without them",
            )
        return tuple(_read(self.path, item.envelope, "attestation") for item in attached)

    def blob_path(self, digest: str) -> Path:
        """Where a blob lies; raises BundleError if it is not there or not a regular file."""
        return _blob_path(self.path, digest)

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Reads every blob and compares its size and digest.

        Args:
            on_progress: Called with the bytes read so far and the bytes in all.

        Raises:
            BundleError: A blob is missing or changed; the message names its file and its digest.
        """
        named = {
            blob.digest: ("engine config", blob) for blob in (item.manifest.config for item in self.variants)
        }
        for variant in self.variants:
            named.update({layer.digest: (layer.title, layer.descriptor) for layer in variant.manifest.layers})
        total_bytes = sum(blob.size_bytes for _, blob in named.values())
        done_bytes = 0

        def count(read_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += read_bytes
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)

        for title, blob in named.values():
            _verify_blob(self.path, title, blob, count)


def _verify_blob(root: Path, title: str, blob: Descriptor, on_bytes: Callable[[int], None]) -> None:
    path = _blob_path(root, blob.digest, title)
    size_bytes = path.stat().st_size
    if size_bytes != blob.size_bytes:
        raise _damaged(title, blob.digest, f"has {size_bytes:,} bytes instead of {blob.size_bytes:,}")
    try:
        found = digests.of_file(path, on_bytes)
    except OSError as error:
        raise _damaged(title, blob.digest, f"cannot be read ({error.strerror})") from error
    if found != blob.digest:
        raise _damaged(title, blob.digest, f"has changed: it is {found} now")


def _check_layout(path: Path) -> None:
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}", "build one with `edgellm build`, or check the path")
    document = manifests.parse_json(_read_small(path / LAYOUT_FILE), LAYOUT_FILE, manifests.MAX_CONFIG_BYTES)
    if document.get("imageLayoutVersion") != LAYOUT_VERSION:
        version = document.get("imageLayoutVersion")
        raise BundleError(f"{path} is an OCI layout of version {version!r:.20}, not {LAYOUT_VERSION}")


def _read_index(path: Path) -> Json:
    return manifests.parse_json(_read_small(path / INDEX_FILE), INDEX_FILE, manifests.MAX_MANIFEST_BYTES)


def _manifests(
    root: Path, index: Json, seen: set[str], depth: int = 0
) -> Iterator[EngineManifest | Referrer]:
    """Engines and attestations that an index reaches; artifacts of other kinds are passed over.

    Each blob is read once: an index may name another a thousand times, and that a third one.
    """
    entries = index.get("manifests")
    if not isinstance(entries, list) or depth == _MAX_INDEX_DEPTH:
        raise BundleError("not an OCI image index, or one nested too deep", "build or fetch the bundle again")
    for entry in entries:
        blob = manifests.parse_descriptor(entry, "index entry", manifests.MAX_MANIFEST_BYTES)
        kinds = {manifests.INDEX_MEDIA_TYPE, manifests.MANIFEST_MEDIA_TYPE}
        if blob.media_type not in kinds or blob.digest in seen:
            continue
        seen.add(blob.digest)
        if len(seen) > _MAX_INDEX_BLOBS:
            raise BundleError(f"more than {_MAX_INDEX_BLOBS} manifests", "fetch a bundle of fewer variants")
        data = _read(root, blob, "manifest")
        document = manifests.parse_json(data, "manifest", manifests.MAX_MANIFEST_BYTES)
        if blob.media_type == manifests.INDEX_MEDIA_TYPE:
            yield from _manifests(root, document, seen, depth + 1)
        elif document.get("artifactType") == manifests.ARTIFACT_TYPE:
            yield EngineManifest.parse(data)
        elif referrers.is_referrer(document):
            yield Referrer.parse(data)


def _read(root: Path, blob: Descriptor, what: str) -> bytes:
    """Reads a small blob, whose descriptor bounds its size, and checks its digest."""
    path = _blob_path(root, blob.digest, what)
    try:
        with path.open("rb") as source:
            data = source.read(blob.size_bytes + 1)
    except OSError as error:
        raise _damaged(what, blob.digest, f"cannot be read ({error.strerror})") from error
    if len(data) != blob.size_bytes or digests.of_bytes(data) != blob.digest:
        raise _damaged(what, blob.digest, "has changed")
    return data


def _read_small(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{path} is not a plain file", "fetch the bundle again")
        with path.open("rb") as source:
            return source.read(manifests.MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleError(
            f"{path.parent} is not an engine bundle: {path.name}: {error.strerror}", "check the path"
        ) from error


def _blob_path(root: Path, digest: str, title: str = "blob") -> Path:
    path = root / BLOBS / digests.hex_of(digest)
    try:
        # A link or a pipe in place of a file could make us read, or send, what is not the bundle's.
        if stat.S_ISREG(path.lstat().st_mode):
            return path
    except OSError:
        pass
    raise _damaged(title, digest, "is missing")


def _damaged(title: str, digest: str, what: str) -> BundleError:
    return BundleError(f"{title} ({digest}) {what}", "the bundle is damaged: build or fetch it again")
