"""A manifest is checked before anything in it is used."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bundle import Descriptor, EngineManifest, Layer
from edgellm.bundle import digest as digests
from edgellm.bundle import manifest as manifests
from edgellm.errors import BundleError
from tests.support.tiny_bundle import make_config

A, B, C = (digests.of_bytes(bytes([number])) for number in range(3))
CONFIG = Descriptor(manifests.CONFIG_MEDIA_TYPE, A, 10)
LAYERS = [
    Layer("weights-00000.bin", manifests.WEIGHTS_MEDIA_TYPE, B, 7),
    Layer("model.onnx", manifests.GRAPH_MEDIA_TYPE, C, 5),
]


def document() -> dict:
    return json.loads(EngineManifest.build(CONFIG, LAYERS).to_json())


def parse(changed: dict) -> EngineManifest:
    return EngineManifest.parse(json.dumps(changed).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(A),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_manifest_or_a_bundle_error(data):
    with pytest.raises(BundleError):
        EngineManifest.parse(data)


@given(st.data(), json_values)
def test_any_change_of_a_good_manifest_is_a_manifest_or_a_bundle_error(data, value):
    changed = document()
    place: object = changed
    while isinstance(place, (dict, list)) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if data.draw(st.booleans()) or not isinstance(place[key], (dict, list)):
            place[key] = value
            break
        place = place[key]
    try:
        manifest = parse(changed)
    except BundleError:
        return
    assert all(
        digests.is_digest(blob.digest) and 0 <= blob.size_bytes <= 1 << 40 for blob in manifest.blobs()
    )


@given(st.integers(0, len(EngineManifest.build(CONFIG, LAYERS).to_json())))
def test_a_truncated_manifest_is_refused(length):
    data = EngineManifest.build(CONFIG, LAYERS).to_json()
    if length < len(data):
        with pytest.raises(BundleError):
            EngineManifest.parse(data[:length])


@pytest.mark.parametrize(
    "title",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "a/b",
        "/etc/passwd",
        "a\\b",
        ".hidden",
        "-rf",
        "a\0b",
        "a\nb",
        "model.onnx\n",
        "a b",
        "\x1b[2J",
        "é",
        "x" * 129,
        "\ud800",
        7,
        None,
    ],
)
def test_an_unsafe_title_is_refused(title):
    changed = document()
    changed["layers"][0]["annotations"]["org.opencontainers.image.title"] = title
    with pytest.raises(BundleError, match="safe file name"):
        parse(changed)


def test_a_title_comes_once():
    changed = document()
    changed["layers"].append(changed["layers"][0])
    with pytest.raises(BundleError, match="twice"):
        parse(changed)


@pytest.mark.parametrize("size", [-1, 1.0, True, "7", None, (1 << 40) + 1])
def test_a_senseless_size_is_refused(size):
    changed = document()
    changed["layers"][0]["size"] = size
    with pytest.raises(BundleError, match="size"):
        parse(changed)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", A.upper(), A[:-1], A + "0", A + "\n", "sha512:" + "0" * 128, None, 3]
)
def test_a_malformed_digest_is_refused(digest):
    changed = document()
    changed["layers"][0]["digest"] = digest
    with pytest.raises(BundleError, match="digest"):
        parse(changed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schemaVersion", 1),
        ("mediaType", "application/vnd.oci.image.index.v1+json"),
        ("artifactType", "application/vnd.other"),
        ("layers", []),
        ("layers", {}),
        ("config", None),
    ],
)
def test_another_kind_of_document_is_refused(key, value):
    with pytest.raises(BundleError):
        parse({**document(), key: value})


def test_one_digest_with_two_sizes_is_refused():
    changed = document()
    changed["layers"][1]["digest"] = changed["layers"][0]["digest"]
    with pytest.raises(BundleError, match="two sizes"):
        parse(changed)


def test_a_key_that_comes_twice_is_refused():
    data = EngineManifest.build(CONFIG, LAYERS).to_json()
    with pytest.raises(BundleError, match="twice"):
        EngineManifest.parse(data[:-1] + b',"schemaVersion":2}')


def test_an_oversized_manifest_is_refused_unparsed():
    with pytest.raises(BundleError, match="more than"):
        EngineManifest.parse(b" " * (4 << 20) + EngineManifest.build(CONFIG, LAYERS).to_json())


def test_deep_nesting_is_refused():
    with pytest.raises(BundleError):
        EngineManifest.parse(b"[" * 1_000_000)


def test_equal_engines_have_equal_digests_and_bytes_survive():
    manifest = EngineManifest.build(CONFIG, LAYERS)
    assert EngineManifest.build(CONFIG, list(reversed(LAYERS))).to_json() == manifest.to_json()
    assert EngineManifest.parse(manifest.to_json()) == manifest
    spaced = json.dumps(document(), indent=2).encode()
    assert EngineManifest.parse(spaced).to_json() == spaced
    assert EngineManifest.parse(spaced).digest == digests.of_bytes(spaced) != manifest.digest


def test_blobs_are_the_config_and_each_layer_once():
    twin = Layer("copy.bin", manifests.WEIGHTS_MEDIA_TYPE, B, 7)
    manifest = EngineManifest.build(CONFIG, [*LAYERS, twin])
    assert [blob.digest for blob in manifest.blobs()] == [A, B, C]
    assert manifest.size_bytes == 10 + 7 + 5


def config_manifest(data: bytes, titles: list[str]) -> EngineManifest:
    blob = Descriptor(manifests.CONFIG_MEDIA_TYPE, digests.of_bytes(data), len(data))
    return EngineManifest.build(blob, [Layer(title, "application/octet-stream", B, 7) for title in titles])


def test_a_config_must_be_the_one_that_the_manifest_names():
    data = make_config().to_json()
    manifest = config_manifest(data, ["model.onnx", "tokenizer.json", "chat.jinja"])
    assert manifest.parse_config(data) == make_config()
    with pytest.raises(BundleError, match="digest"):
        manifest.parse_config(data + b" ")


def test_a_config_must_not_name_a_missing_file():
    data = make_config().to_json()
    with pytest.raises(BundleError, match=r"chat\.jinja"):
        config_manifest(data, ["model.onnx", "tokenizer.json"]).parse_config(data)


def test_a_malformed_config_names_the_field():
    data = make_config().to_json().replace(b'"layers":2', b'"layers":0')
    with pytest.raises(BundleError, match=r"model\.layers"):
        config_manifest(data, ["model.onnx"]).parse_config(data)
