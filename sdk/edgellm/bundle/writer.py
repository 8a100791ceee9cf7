"""Writes a bundle: files become blobs while they are hashed, and the whole appears at once or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from edgellm.bundle import digest as digests
from edgellm.bundle import manifest as manifests
from edgellm.bundle import referrers
from edgellm.bundle.config import EngineConfig
from edgellm.bundle.layout import BLOBS, INDEX_FILE, LAYOUT_FILE, LAYOUT_VERSION, Bundle
from edgellm.bundle.manifest import Descriptor, EngineManifest, Json, Layer, canonical_json
from edgellm.bundle.referrers import Referrer
from edgellm.errors import BundleError

if TYPE_CHECKING:
    from typing_extensions import Self

_WEIGHT_SUFFIXES = {".bin", ".data", ".safetensors", ".weights"}
_ANNOTATION = "vnd.edgellm."


class BundleWriter:
    """Context manager that builds a bundle beside `target` and moves it there when the block ends well.

    An earlier bundle at `target` is replaced; anything else there is refused. When the block raises, or
    a config names a file that is missing, nothing is left behind.

        with BundleWriter(Path("smollm2.bundle")) as writer:
            digest = writer.add(engine_files, config)
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._partial = Path()
        self._variants: dict[str, Json] = {}
        self._attached: dict[str, Json] = {}

    def __enter__(self) -> Self:
        """Makes the temporary directory; raises BundleError if the target cannot be replaced."""
        if self._target.exists() and not (self._target / LAYOUT_FILE).is_file():
            raise BundleError(f"{self._target} exists and is not a bundle", "choose another path")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=self._target.parent))
        (self._partial / BLOBS).mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Puts the bundle in place, or drops it if the block raised."""
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, files: Path, config: EngineConfig, *, move: bool = True) -> str:
        """Adds a variant: all files of a directory, and its config.

        Args:
            files: Directory of plain files, whose names become the titles.
            config: What the engine says about itself.
            move: Take the files away from `files` (renamed where the file system allows it), or copy them.

        Returns:
            Digest of the variant's manifest.

        Raises:
            BundleError: A file is not plain or has an unsafe name.
            OSError: A file cannot be read or written.
        """
        paths = sorted(files.iterdir())
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{path} is not a plain file", "an engine directory holds files only")
        config_blob = self._add_bytes(config.to_json(), manifests.CONFIG_MEDIA_TYPE)
        layers = [self._add_file(path, _media_type(path, config), move) for path in paths]
        manifest = EngineManifest.build(config_blob, layers)
        blob = self._add_bytes(manifest.to_json(), manifests.MANIFEST_MEDIA_TYPE)
        self._variants[blob.digest] = _index_entry(blob, config)
        return blob.digest

    def attest(self, digest: str, envelope: bytes) -> None:
        """Attaches an attestation to a variant that was added; raises BundleError if it is too large."""
        size_bytes = self._blob(digest).stat().st_size
        subject = Descriptor(manifests.MANIFEST_MEDIA_TYPE, digest, size_bytes)
        referrer = Referrer.build(subject, envelope)
        for data in (envelope, referrers.EMPTY, referrer.raw):
            self._add_bytes(data, "")
        self._attached[referrer.descriptor.digest] = referrer.index_entry()

    def _add_bytes(self, data: bytes, media_type: str) -> Descriptor:
        digest = digests.of_bytes(data)
        self._blob(digest).write_bytes(data)
        return Descriptor(media_type, digest, len(data))

    def _add_file(self, source: Path, media_type: str, move: bool) -> Layer:
        size_bytes = source.stat().st_size
        if move:
            digest = digests.of_file(source)
            _move(source, self._blob(digest))
        else:
            digest = self._copy(source)
        return Layer(source.name, media_type, digest, size_bytes)

    def _copy(self, source: Path) -> str:
        copy = self._partial / "copy"
        with source.open("rb", buffering=0) as reader, copy.open("wb", buffering=0) as writer:
            digest = digests.of_stream(reader, copy_to=writer)
        copy.replace(self._blob(digest))
        return digest

    def _blob(self, digest: str) -> Path:
        return self._partial / BLOBS / digests.hex_of(digest)

    def _finish(self) -> None:
        if not self._variants:
            raise BundleError("a bundle needs at least one engine")
        entries = [*self._variants.values(), *self._attached.values()]
        index = self._add_bytes(index_json(entries), manifests.INDEX_MEDIA_TYPE)
        (self._partial / INDEX_FILE).write_bytes(index_json([index.to_dict()]))
        (self._partial / LAYOUT_FILE).write_bytes(canonical_json({"imageLayoutVersion": LAYOUT_VERSION}))
        Bundle.open(self._partial)
        self._partial.chmod(0o755)
        _replace_directory(self._partial, self._target)


def _media_type(path: Path, config: EngineConfig) -> str:
    by_title = {
        config.files.graph: manifests.GRAPH_MEDIA_TYPE,
        config.files.graph_ragged: manifests.GRAPH_MEDIA_TYPE,
        config.files.tokenizer: manifests.TOKENIZER_MEDIA_TYPE,
        config.files.chat_template: manifests.CHAT_TEMPLATE_MEDIA_TYPE,
    }
    default = manifests.WEIGHTS_MEDIA_TYPE if path.suffix in _WEIGHT_SUFFIXES else manifests.OTHER_MEDIA_TYPE
    return by_title.get(path.name, default)


def index_json(entries: list[Json]) -> bytes:
    """An image index, canonical."""
    return canonical_json({"schemaVersion": 2, "mediaType": manifests.INDEX_MEDIA_TYPE, "manifests": entries})


def _index_entry(blob: Descriptor, config: EngineConfig) -> Json:
    target = config.target
    annotations = {"name": config.name, "runtime": config.runtime, "profile": target.profile}
    if target.sm is not None:
        annotations["sm"] = target.sm
    entry: Json = {
        **blob.to_dict(),
        "artifactType": manifests.ARTIFACT_TYPE,
        "annotations": {_ANNOTATION + key: value for key, value in annotations.items()},
    }
    if target.architecture != "any":
        entry["platform"] = {"os": "linux", "architecture": target.architecture}
    return entry


def _move(source: Path, blob: Path) -> None:
    try:
        source.replace(blob)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(source, blob)
    blob.chmod(0o644)


def _replace_directory(new: Path, target: Path) -> None:
    """Renames `new` to `target`; an old directory there steps aside first and comes back if that fails."""
    if not target.exists():
        new.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(aside)
        new.rename(target)
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)
