import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.bundle.manifest import CONFIG_MEDIA_TYPE, Descriptor, EngineManifest, Layer
from edgellm_agent.errors import (
    ConflictError,
    DataLossError,
    InvalidError,
    NotFoundError,
    OffsetError,
    TooLargeError,
)
from edgellm_agent.store import Store


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def blob_of(data):
    return Descriptor("", digest_of(data), len(data))


def put(store, data):
    store.put(data)
    return blob_of(data)


def manifest_of(store, files):
    config = b"{}"
    store.put(config)
    layers = [Layer(title, "application/octet-stream", digest_of(d), len(d)) for title, d in files.items()]
    manifest = EngineManifest.build(Descriptor(CONFIG_MEDIA_TYPE, digest_of(config), len(config)), layers)
    store.put(manifest.to_json())
    return manifest


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def files_under(path):
    return sorted(p.name for p in path.rglob("*") if p.is_file())


def test_a_blob_becomes_visible_only_when_it_is_whole(store):
    data = b"weights" * 1000
    ingest = store.ingest(blob_of(data), 0)
    ingest.write(data[:500])
    ingest.commit()
    assert not store.has(digest_of(data))
    ingest.write(data[500:])
    ingest.commit()
    ingest.close()
    assert store.read(digest_of(data)) == data
    assert store.missing([blob_of(data)]) == []


def test_a_cut_write_goes_on_where_it_was_cut_also_in_another_process(store, tmp_path):
    data = os.urandom(3000)
    ingest = store.ingest(blob_of(data), 0)
    ingest.write(data[:1234])
    ingest.close()
    again = Store(tmp_path)
    assert again.missing([blob_of(data)]) == [(blob_of(data), 1234)]
    ingest = again.ingest(blob_of(data), 1234)
    ingest.write(data[1234:])
    ingest.commit()
    ingest.close()
    assert again.read(digest_of(data)) == data


def test_a_write_can_begin_again_from_the_first_byte(store):
    data = os.urandom(3000)
    ingest = store.ingest(blob_of(data), 0)
    ingest.write(b"wrong" * 100)
    ingest.restart()
    assert (ingest.offset_bytes, store.status(digest_of(data))) == (0, 0)
    ingest.write(data)
    ingest.commit()
    ingest.close()
    assert store.read(digest_of(data)) == data


def test_wrong_bytes_are_refused_and_dropped(store, tmp_path):
    blob = blob_of(b"right")
    ingest = store.ingest(blob, 0)
    ingest.write(b"wrong")
    with pytest.raises(DataLossError, match="digest"):
        ingest.commit()
    ingest.close()
    assert files_under(tmp_path) == []
    assert store.missing([blob]) == [(blob, 0)]


def test_a_wrong_offset_is_told_the_right_one(store):
    blob = blob_of(b"0123456789")
    ingest = store.ingest(blob, 0)
    ingest.write(b"0123")
    ingest.close()
    with pytest.raises(OffsetError) as refused:
        store.ingest(blob, 7)
    assert refused.value.offset_bytes == 4


def test_more_bytes_than_the_blob_has_are_refused(store):
    ingest = store.ingest(blob_of(b"four"), 0)
    with pytest.raises(InvalidError):
        ingest.write(b"fives")
    ingest.close()


def test_two_pushes_cannot_write_one_blob_at_a_time(store):
    blob = blob_of(b"data")
    ingest = store.ingest(blob, 0)
    with pytest.raises(ConflictError):
        store.ingest(blob, 0)
    ingest.close()
    store.ingest(blob, 0).close()


def test_a_full_disk_says_so_and_the_write_can_go_on_later(store):
    data = b"x" * 5000
    ingest = store.ingest(blob_of(data), 0)
    ingest.write(data[:1000])
    # The device that refuses every write as a full disk does.
    real, ingest._file = ingest._file, Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(TooLargeError, match="disk") as refused:
        ingest.write(data[1000:])
    assert refused.value.needed_bytes == 4000
    ingest._file.close()
    ingest._file = real
    ingest.close()
    assert store.status(digest_of(data)) == 1000


def test_a_changed_byte_on_disk_is_found_named_and_dropped(store):
    files = {"model.onnx": b"graph", "weights-00000.bin": b"weights"}
    for data in files.values():
        store.put(data)
    manifest = manifest_of(store, files)
    store.verify(manifest)
    path = store.blob_path(digest_of(b"weights"))
    path.chmod(0o640)
    path.write_bytes(b"weighty")
    with pytest.raises(DataLossError, match=r"weights-00000\.bin"):
        store.verify(manifest)
    with pytest.raises(NotFoundError, match=r"weights-00000\.bin"):
        store.verify(manifest)


def test_an_engine_directory_has_the_files_by_title_and_takes_no_space(store):
    store.put(b"graph")
    manifest = manifest_of(store, {"model.onnx": b"graph"})
    for _ in range(2):
        directory = store.link(manifest)
        assert [p.name for p in directory.iterdir()] == ["model.onnx"]
        assert (directory / "model.onnx").samefile(store.blob_path(digest_of(b"graph")))


def test_the_garbage_collector_keeps_what_engines_need_and_what_is_being_written(store):
    for data in (b"graph", b"old graph"):
        store.put(data)
    keep, old = manifest_of(store, {"model.onnx": b"graph"}), manifest_of(store, {"model.onnx": b"old graph"})
    store.link(keep)
    store.link(old)
    coming = store.ingest(blob_of(b"coming"), 0)
    coming.write(b"com")
    stale = store.ingest(blob_of(b"stale"), 0)
    stale.write(b"sta")
    stale.close()
    freed = store.collect([keep])
    # Of a blob that was on its way, what was reserved comes free.
    assert freed >= len(old.to_json()) + len(b"old graph") + len(b"stale")
    assert store.has(digest_of(b"graph"))
    assert not store.has(digest_of(b"old graph"))
    assert store.status(digest_of(b"coming")) == 3
    assert [p.name for p in store.link(keep).parent.iterdir()] == [keep.digest.removeprefix("sha256:")]
    coming.close()


@settings(deadline=None, max_examples=30)
@given(data=st.binary(min_size=1, max_size=4000), cuts=st.lists(st.integers(0, 4000), max_size=5))
def test_however_a_blob_is_cut_it_arrives_whole(tmp_path_factory, data, cuts):
    store = Store(tmp_path_factory.mktemp("store"))
    blob = blob_of(data)
    for end in [*sorted(c for c in cuts if c < len(data)), len(data)]:
        offset = store.status(blob.digest)
        ingest = store.ingest(blob, offset)
        ingest.write(data[offset:end])
        ingest.commit()
        ingest.close()
    assert store.read(blob.digest) == data
