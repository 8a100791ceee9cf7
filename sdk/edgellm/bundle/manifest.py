"""The OCI manifest of one engine: a typed config and one titled layer per file; nothing unchecked is used."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import pydantic

from edgellm.bundle import digest as digests
from edgellm.bundle.config import EngineConfig
from edgellm.errors import BundleError

MANIFEST_MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_MEDIA_TYPE = "application/vnd.oci.image.index.v1+json"
ARTIFACT_TYPE = "application/vnd.edgellm.engine.v1"
CONFIG_MEDIA_TYPE = "application/vnd.edgellm.engine.config.v1+json"
GRAPH_MEDIA_TYPE = "application/vnd.edgellm.graph.onnx"
WEIGHTS_MEDIA_TYPE = "application/vnd.edgellm.weights.v1"
TOKENIZER_MEDIA_TYPE = "application/vnd.edgellm.tokenizer.v1+json"
CHAT_TEMPLATE_MEDIA_TYPE = "application/vnd.edgellm.chat-template.v1+jinja"
OTHER_MEDIA_TYPE = "application/octet-stream"

MAX_MANIFEST_BYTES = 4 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_BLOB_BYTES = 1 << 40

_TITLE_KEY = "org.opencontainers.image.title"
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")

Json = dict[str, object]


@dataclass(frozen=True)
class Descriptor:
    """A blob by its content: media type, digest and size."""

    media_type: str
    digest: str
    size_bytes: int

    def to_dict(self) -> Json:
        """The descriptor as OCI's JSON has it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}


@dataclass(frozen=True)
class Layer:
    """A file of the engine; `title` is its plain name, without any directory."""

    title: str
    media_type: str
    digest: str
    size_bytes: int

    @property
    def descriptor(self) -> Descriptor:
        """The blob that holds the file."""
        return Descriptor(self.media_type, self.digest, self.size_bytes)

    def to_dict(self) -> Json:
        """The layer as OCI's JSON has it."""
        return {**self.descriptor.to_dict(), "annotations": {_TITLE_KEY: self.title}}


@dataclass(frozen=True)
class EngineManifest:
    """An engine's config and files; its name is the digest of its bytes."""

    config: Descriptor
    layers: tuple[Layer, ...]
    raw: bytes = field(repr=False)

    @classmethod
    def build(cls, config: Descriptor, layers: Sequence[Layer]) -> EngineManifest:
        """Makes a manifest; layers are sorted by title: equal engines, equal digests. Raises BundleError."""
        document: Json = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_MEDIA_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": config.to_dict(),
            "layers": [layer.to_dict() for layer in sorted(layers, key=lambda layer: layer.title)],
        }
        return cls.parse(canonical_json(document))

    @classmethod
    def parse(cls, data: bytes) -> EngineManifest:
        """Checks all that can be checked without the blobs; raises BundleError, which names what is wrong."""
        document = parse_json(data, "manifest", MAX_MANIFEST_BYTES)
        _check_kind(document)
        config = parse_descriptor(document.get("config"), "config", MAX_CONFIG_BYTES)
        if config.media_type != CONFIG_MEDIA_TYPE:
            _refuse(f"manifest: config is {config.media_type!r}, not {CONFIG_MEDIA_TYPE!r}")
        layers = tuple(_parse_layer(item) for item in _list(document.get("layers"), "layers"))
        manifest = cls(config, layers, data)
        _check_titles(manifest)
        _check_sizes(manifest)
        return manifest

    def to_json(self) -> bytes:
        """The manifest's bytes, exactly as they were read or built."""
        return self.raw

    @cached_property
    def digest(self) -> str:
        """The engine's name: digest of the manifest's bytes."""
        return digests.of_bytes(self.raw)

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs, each counted once."""
        return sum(blob.size_bytes for blob in self.blobs())

    def blobs(self) -> tuple[Descriptor, ...]:
        """The config and the layers, each digest once."""
        by_digest = {self.config.digest: self.config}
        for layer in self.layers:
            by_digest.setdefault(layer.digest, layer.descriptor)
        return tuple(by_digest.values())

    def parse_config(self, data: bytes) -> EngineConfig:
        """Parses the config blob after checking that it is the one named here; raises BundleError."""
        if digests.of_bytes(data) != self.config.digest:
            _refuse(f"engine config does not match its digest {self.config.digest}")
        try:
            config = EngineConfig.from_json(data)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            _refuse(f"engine config: {where or 'document'}: {first['msg']}")
        titles = {layer.title for layer in self.layers}
        files = config.files
        for title in (files.graph, files.graph_ragged, files.tokenizer, files.chat_template):
            if title is not None and title not in titles:
                _refuse(f"engine config names the file {title}, which the manifest does not have")
        return config


def canonical_json(document: Json) -> bytes:
    """Sorted keys, no spaces, ASCII: equal documents have equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def parse_json(data: bytes, what: str, max_bytes: int) -> Json:
    """Parses a bounded JSON object in which no key comes twice; raises BundleError."""
    if len(data) > max_bytes:
        _refuse(f"{what}: {len(data):,} bytes, more than {max_bytes:,}")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{what}: not valid JSON ({error})") from None
    if not isinstance(document, dict):
        _refuse(f"{what}: not a JSON object")
    return document


def parse_descriptor(value: object, what: str, max_bytes: int = MAX_BLOB_BYTES) -> Descriptor:
    """Checks one OCI descriptor; raises BundleError, which says `what` it is."""
    if not isinstance(value, dict):
        _refuse(f"{what}: not a descriptor")
    media_type, size = value.get("mediaType"), value.get("size")
    if not isinstance(media_type, str) or not _MEDIA_TYPE.fullmatch(media_type):
        _refuse(f"{what}: not a media type: {media_type!r:.100}")
    if not digests.is_digest(value.get("digest")):
        _refuse(f"{what}: not a SHA-256 digest: {value.get('digest')!r:.100}")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= max_bytes:
        _refuse(f"{what}: size is not between 0 and {max_bytes:,}: {size!r:.100}")
    return Descriptor(media_type, digests.checked(value["digest"]), size)


def _parse_layer(value: object) -> Layer:
    annotations = value.get("annotations") if isinstance(value, dict) else None
    title = annotations.get(_TITLE_KEY) if isinstance(annotations, dict) else None
    if not isinstance(title, str) or not _TITLE.fullmatch(title):
        # One plain visible name: no directory, no "..", no NUL, nothing a shell or a terminal would act on.
        _refuse(f"layer: not a safe file name: {title!r:.100}")
    blob = parse_descriptor(value, f"layer {title}")
    return Layer(title, blob.media_type, blob.digest, blob.size_bytes)


def _check_kind(document: Json) -> None:
    expected = {"schemaVersion": 2, "mediaType": MANIFEST_MEDIA_TYPE, "artifactType": ARTIFACT_TYPE}
    for key, value in expected.items():
        if document.get(key) != value:
            _refuse(f"manifest: {key} is {document.get(key)!r:.100}, not {value!r}")


def _check_titles(manifest: EngineManifest) -> None:
    if not manifest.layers:
        _refuse("manifest: no layers")
    seen: set[str] = set()
    for layer in manifest.layers:
        if layer.title in seen:
            _refuse(f"manifest: the file {layer.title} is there twice")
        seen.add(layer.title)


def _check_sizes(manifest: EngineManifest) -> None:
    sizes = {manifest.config.digest: manifest.config.size_bytes}
    for layer in manifest.layers:
        if sizes.setdefault(layer.digest, layer.size_bytes) != layer.size_bytes:
            _refuse(f"layer {layer.title}: {layer.digest} has two sizes")
    if sum(sizes.values()) > MAX_BLOB_BYTES:
        _refuse(f"manifest: more than {MAX_BLOB_BYTES:,} bytes in all")


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        _refuse(f"manifest: {what} is not a list")
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> Json:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key comes twice")
    return document


def _refuse(message: str) -> NoReturn:
    raise BundleError(message, "build or fetch the bundle again")
