"""A bundle appears whole or not at all, and one changed byte anywhere is found."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle import digest as digests
from edgellm.bundle import layout as layouts
from edgellm.bundle import manifest as manifests
from edgellm.errors import BundleError
from tests.support.tiny_bundle import WEIGHTS, make_config, make_files


def blob_files(bundle):
    return sorted((bundle.path / "blobs" / "sha256").iterdir())


def test_a_bundle_is_an_oci_image_layout(bundle, config):
    index = json.loads((bundle.path / "index.json").read_bytes())
    assert json.loads((bundle.path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = index["manifests"]
    assert entry["mediaType"] == "application/vnd.oci.image.index.v1+json"
    (variant,) = json.loads(bundle.blob_path(entry["digest"]).read_bytes())["manifests"]
    assert variant["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert variant["artifactType"] == "application/vnd.edgellm.engine.v1"
    assert variant["annotations"]["vnd.edgellm.profile"] == config.target.profile
    assert variant["digest"] == bundle.variants[0].digest
    assert all(digests.of_file(path) == f"sha256:{path.name}" for path in blob_files(bundle))


def test_files_get_their_media_types_and_content_survives(bundle, config):
    (variant,) = bundle.variants
    layers = {layer.title: layer for layer in variant.manifest.layers}
    assert {title: layer.media_type for title, layer in layers.items()} == {
        "model.onnx": "application/vnd.edgellm.graph.onnx",
        "tokenizer.json": "application/vnd.edgellm.tokenizer.v1+json",
        "chat.jinja": "application/vnd.edgellm.chat-template.v1+jinja",
        "weights-00000.bin": "application/vnd.edgellm.weights.v1",
    }
    assert bundle.blob_path(layers["weights-00000.bin"].digest).read_bytes() == WEIGHTS
    assert bundle.config(bundle.manifest(variant.digest)) == config


def test_the_same_input_gives_the_same_digest_moved_or_copied(bundle, tmp_path, config):
    with BundleWriter(tmp_path / "again") as writer:
        digest = writer.add(make_files(tmp_path / "copied"), config, move=False)
    assert digest == bundle.variants[0].digest
    assert [path.name for path in blob_files(Bundle.open(tmp_path / "again"))] == [
        path.name for path in blob_files(bundle)
    ]
    assert (tmp_path / "again/index.json").read_bytes() == (bundle.path / "index.json").read_bytes()


def test_files_are_moved_unless_copying_was_asked_for(bundle, tmp_path, config):
    assert list((tmp_path / "files").iterdir()) == []
    with BundleWriter(tmp_path / "again") as writer:
        writer.add(make_files(tmp_path / "copied"), config, move=False)
    assert len(list((tmp_path / "copied").iterdir())) == 4


def test_a_move_to_another_file_system_copies(tmp_path, config, monkeypatch):
    def cross_device(self, target):
        raise OSError(18, "Invalid cross-device link")

    files = make_files(tmp_path / "files")
    monkeypatch.setattr("pathlib.Path.replace", cross_device)
    with BundleWriter(tmp_path / "b") as writer:
        writer.add(files, config)
    Bundle.open(tmp_path / "b").verify()
    assert list(files.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing_behind_and_the_old_bundle_whole(bundle, tmp_path, config, failure):
    def build():
        with BundleWriter(bundle.path) as writer:
            writer.add(make_files(tmp_path / "new", weights=b"new"), config)
            raise failure

    with pytest.raises(type(failure)):
        build()
    Bundle.open(bundle.path).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "new", "tiny.bundle"]


def test_a_failed_exchange_brings_the_old_bundle_back(bundle, tmp_path, config, monkeypatch):
    rename = layouts.Path.rename

    def failing(self, target):
        if target == bundle.path and ".old." not in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr("pathlib.Path.rename", failing)
    with pytest.raises(OSError, match="no"), BundleWriter(bundle.path) as writer:
        writer.add(make_files(tmp_path / "new", weights=b"new"), config)
    assert Bundle.open(bundle.path).variants == bundle.variants
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "new", "tiny.bundle"]


def test_a_new_build_replaces_the_old_one(bundle, tmp_path, config):
    with BundleWriter(bundle.path) as writer:
        digest = writer.add(make_files(tmp_path / "new", weights=b"new"), config)
    assert [variant.digest for variant in Bundle.open(bundle.path).variants] == [digest]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "new", "tiny.bundle"]


def test_a_directory_that_is_no_bundle_is_never_replaced(tmp_path, config):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    with pytest.raises(BundleError, match="not a bundle"), BundleWriter(tmp_path / "photos"):
        pass
    assert (tmp_path / "photos/cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("name", [".hidden", "a b", "naïve"])
def test_a_file_with_an_unsafe_name_is_not_written(tmp_path, files, config, name):
    (files / name).write_bytes(b"")
    with pytest.raises(BundleError, match="safe file name"), BundleWriter(tmp_path / "b") as writer:
        writer.add(files, config)
    assert not (tmp_path / "b").exists()


def test_a_link_is_not_followed_into_a_bundle(tmp_path, files, config):
    (files / "secret").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="plain file"), BundleWriter(tmp_path / "b") as writer:
        writer.add(files, config)


def test_a_missing_tokenizer_is_found_when_the_bundle_is_written(tmp_path, files, config):
    (files / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json"), BundleWriter(tmp_path / "b") as writer:
        writer.add(files, config)


def test_an_empty_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="at least one"), BundleWriter(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_variant_is_selected_by_what_it_is_for(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        nano = writer.add(make_files(tmp_path / "1"), make_config("orin-nano-8gb"))
        thor_config = make_config("thor-t5000")
        target = thor_config.target.model_copy(update={"architecture": "arm64", "sm": "11.0"})
        thor = writer.add(make_files(tmp_path / "2"), thor_config.model_copy(update={"target": target}))
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.select(profile="thor-t5000").digest == thor
    assert bundle.select(architecture="amd64").digest == nano
    assert bundle.select(architecture="arm64", profile="thor-t5000", runtime="onnxruntime").digest == thor
    with pytest.raises(BundleError, match="tensorrt") as error:
        bundle.select(runtime="tensorrt")
    assert "onnxruntime 11.0 thor-t5000" in error.value.hint
    bundle.verify()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_changed_byte_in_any_blob_is_found(bundle, data):
    path = data.draw(st.sampled_from(blob_files(bundle)))
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(bundle.path).verify()
    finally:
        path.write_bytes(good)


def test_a_damaged_file_is_named_by_title_and_digest(bundle):
    layer = next(item for item in bundle.variants[0].manifest.layers if item.title == "weights-00000.bin")
    path = bundle.blob_path(layer.digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        BundleError, match=rf"weights-00000\.bin \({layer.digest}\) has 3,145,727 bytes instead"
    ):
        bundle.verify()
    path.unlink()
    with pytest.raises(BundleError, match=rf"weights-00000\.bin \({layer.digest}\) is missing"):
        bundle.verify()


def test_a_blob_that_is_a_link_or_a_pipe_is_refused(bundle):
    digest = bundle.variants[0].manifest.layers[0].digest
    path = bundle.blob_path(digest)
    path.rename(bundle.path / "elsewhere")
    path.symlink_to(bundle.path / "elsewhere")
    with pytest.raises(BundleError, match="missing"):
        bundle.blob_path(digest)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="missing"):
        bundle.verify()


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "sha256:../../../etc/passwd"])
def test_a_blob_path_never_leaves_the_bundle(bundle, digest):
    with pytest.raises(BundleError, match="digest"):
        bundle.blob_path(digest)


def test_verify_reports_all_bytes(bundle):
    seen = []
    bundle.verify(lambda done, total: seen.append((done, total)))
    total = bundle.variants[0].manifest.size_bytes
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b"\xff", b'{"manifests":[3]}', b'{"manifests":[]}']
)
def test_a_broken_layout_is_a_bundle_error(bundle, name, content):
    (bundle.path / name).unlink()
    if content is not None:
        (bundle.path / name).write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)


def test_no_bundle_at_all_is_a_bundle_error(tmp_path):
    with pytest.raises(BundleError, match="no bundle"):
        Bundle.open(tmp_path / "nowhere")


def test_what_is_attached_to_an_engine_is_passed_over(bundle):
    # As oras leaves a layout: a signature beside the engine, and the engine's manifest named at the top.
    def add_blob(document: dict) -> dict:
        data = manifests.canonical_json(document)
        digest = digests.of_bytes(data)
        (bundle.path / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": manifests.MANIFEST_MEDIA_TYPE, "digest": digest, "size": len(data)}

    index = json.loads((bundle.path / "index.json").read_bytes())
    manifest = bundle.variants[0].manifest
    index["manifests"] = [
        add_blob({"schemaVersion": 2, "artifactType": "application/vnd.in-toto+json"}),
        {"mediaType": manifests.MANIFEST_MEDIA_TYPE, "digest": manifest.digest, "size": len(manifest.raw)},
    ]
    (bundle.path / "index.json").write_text(json.dumps(index))
    assert Bundle.open(bundle.path).variants == bundle.variants


def test_an_index_that_names_itself_ever_deeper_is_refused(bundle):
    index_entry = json.loads((bundle.path / "index.json").read_bytes())["manifests"]
    for _ in range(5):
        data = manifests.canonical_json({"schemaVersion": 2, "manifests": index_entry})
        digest = digests.of_bytes(data)
        (bundle.path / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
        index_entry = [{"mediaType": manifests.INDEX_MEDIA_TYPE, "digest": digest, "size": len(data)}]
    (bundle.path / "index.json").write_bytes(manifests.canonical_json({"manifests": index_entry}))
    with pytest.raises(BundleError, match="deep"):
        Bundle.open(bundle.path)


def test_a_copied_bundle_is_the_same_bundle(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "copy")
    assert Bundle.open(tmp_path / "copy").variants == bundle.variants
