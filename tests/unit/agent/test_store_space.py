"""Space is reserved before the first byte, and a disk that fails is told in one sentence."""

import ctypes
import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import CONFIG_MEDIA_TYPE, Descriptor, EngineManifest, Layer
from edgellm_agent.errors import DataLossError, NotFoundError, TooLargeError
from edgellm_agent.store import Store, StoreError, StoreSettings, disk, space
from tests.support.small_disk import run_on, small_disk

MIB = 1 << 20
Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil's own


def blob(number: int, size_bytes: int) -> Descriptor:
    return Descriptor("", digests.of_bytes(bytes([number])), size_bytes)


def disk_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def files_under(path: Path) -> list[str]:
    return sorted(p.name for p in path.rglob("*") if p.is_file())


@pytest.fixture
def no_fallocate(monkeypatch):
    """A file system that cannot reserve."""

    class Libc:
        @staticmethod
        def fallocate(*_):
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(space, "_libc", Libc)


def free_disk(monkeypatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free_bytes))


def test_what_is_reserved_takes_the_disk_and_has_no_bytes_yet(tmp_path):
    store, wanted = Store(tmp_path), blob(1, 4 * MIB)
    store.reserve([wanted])
    path = store.ingest_path(wanted.digest)
    assert disk_bytes(path) >= 4 * MIB
    assert store.missing([wanted]) == [(wanted, 0)]
    assert store.lacking_bytes([wanted]) == 0


def test_a_reservation_outlives_the_agent_and_is_not_counted_twice(tmp_path, monkeypatch):
    wanted = blob(1, 4 * MIB)
    Store(tmp_path).reserve([wanted])
    free_disk(monkeypatch, 0)  # for anybody else
    again = Store(tmp_path)
    again.reserve([wanted])
    with pytest.raises(TooLargeError):
        again.reserve([wanted, blob(2, 1)])


def test_a_write_that_begins_again_keeps_its_space(tmp_path):
    store, wanted = Store(tmp_path), blob(1, 4 * MIB)
    ingest = store.ingest(wanted, 0)
    ingest.write(b"x" * MIB)
    ingest.restart()
    ingest.close()
    assert disk_bytes(store.ingest_path(wanted.digest)) >= 4 * MIB


def test_bytes_that_come_use_what_is_reserved_for_them(tmp_path):
    store, wanted = Store(tmp_path), blob(1, 4 * MIB)
    store.reserve([wanted])
    before = disk_bytes(store.ingest_path(wanted.digest))
    ingest = store.ingest(wanted, 0)
    ingest.write(b"x" * 3 * MIB)
    os.sync()
    ingest.close()
    assert disk_bytes(store.ingest_path(wanted.digest)) == before
    assert store.status(wanted.digest) == 3 * MIB


def test_a_refusal_says_how_much_is_missing_and_leaves_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path, StoreSettings(spare_bytes=100 * MIB))
    free_disk(monkeypatch, 107 * MIB)
    with pytest.raises(TooLargeError, match="are missing") as refused:
        store.reserve([blob(1, 4 * MIB), blob(2, 4 * MIB)])
    assert (refused.value.needed_bytes, refused.value.available_bytes) == (8 * MIB, 7 * MIB)
    assert files_under(tmp_path) == []
    store.reserve([blob(1, 4 * MIB)])


def test_dropping_what_nobody_needs_frees_what_was_reserved(tmp_path):
    store = Store(tmp_path)
    store.reserve([blob(1, 4 * MIB)])
    assert store.collect([]) >= 4 * MIB
    assert files_under(tmp_path) == []


@pytest.mark.usefixtures("no_fallocate")
def test_without_help_of_the_file_system_two_pushes_are_not_promised_the_same_space(tmp_path, monkeypatch):
    store = Store(tmp_path, StoreSettings(spare_bytes=0))
    free_disk(monkeypatch, 10 * MIB)
    store.reserve([blob(1, 6 * MIB)])
    assert disk_bytes(store.ingest_path(blob(1, 0).digest)) == 0
    with pytest.raises(TooLargeError) as refused:
        store.reserve([blob(2, 5 * MIB)])
    assert refused.value.available_bytes == 4 * MIB
    store.reserve([blob(1, 6 * MIB)])
    store.collect([])
    store.reserve([blob(2, 5 * MIB)])


@pytest.mark.usefixtures("no_fallocate")
def test_a_promise_shrinks_as_the_bytes_come(tmp_path, monkeypatch):
    store = Store(tmp_path, StoreSettings(spare_bytes=0))
    free_disk(monkeypatch, 10 * MIB)
    ingest = store.ingest(blob(1, 6 * MIB), 0)
    ingest.write(b"x" * 2 * MIB)
    ingest.close()
    free_disk(monkeypatch, 8 * MIB)
    assert store.free_bytes() == 4 * MIB


@pytest.mark.usefixtures("no_fallocate")
@settings(deadline=None, max_examples=30)
@given(pushes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=6))
def test_no_more_is_ever_promised_than_there_is(tmp_path_factory, pushes):
    store = Store(tmp_path_factory.mktemp("store"), StoreSettings(spare_bytes=0))
    usage, shutil.disk_usage = shutil.disk_usage, lambda _: Usage(0, 0, 30)
    try:
        for push in pushes:
            wanted = [blob(number, 3 * number) for number in push]
            before = files_under(store.blobs.parents[1])
            needed = sum({b.digest: store.lacking_bytes([b]) for b in wanted}.values())
            try:
                store.reserve(wanted)
            except TooLargeError:
                assert files_under(store.blobs.parents[1]) == before
            else:
                assert needed <= 30
            kept = [blob(number, 3 * number) for number in range(6)]
            promised = sum(b.size_bytes for b in kept if store.ingest_path(b.digest).exists())
            assert promised <= 30
    finally:
        shutil.disk_usage = usage


def test_on_a_disk_that_fills_up_meanwhile_all_is_given_back(tmp_path):
    """The figures say that there is room; the file system knows better."""
    code = """
import os, shutil, sys
from pathlib import Path
from collections import namedtuple
from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import Descriptor
from edgellm_agent.errors import TooLargeError
from edgellm_agent.store import Store
root = Path(sys.argv[1])
store = Store(root)
old = Descriptor("", digests.of_bytes(b"0"), 3 << 20)
ingest = store.ingest_path(old.digest)
ingest.write_bytes(b"x" * (1 << 20))
free = os.statvfs(root).f_bavail
real = shutil.disk_usage
shutil.disk_usage = lambda path: namedtuple("U", "free")(1 << 40)
blobs = [Descriptor("", digests.of_bytes(bytes([n])), 3 << 20) for n in range(5)]
try:
    store.reserve([old, *blobs])
except TooLargeError as error:
    print(error.needed_bytes == 17 << 20)
print(os.statvfs(root).f_bavail == free, ingest.stat().st_size == 1 << 20, len(list(ingest.parent.iterdir())))
"""
    disk_ = tmp_path / "disk"
    assert run_on(small_disk(disk_, "8m"), code, disk_).split() == ["True", "True", "True", "1"]


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import Descriptor
from edgellm_agent.store import Store, StoreError, StoreSettings
root = Path(sys.argv[1])
blob = Descriptor("", digests.of_bytes(b"data"), 4)
store = Store(root, StoreSettings(spare_bytes=0))
store.reserve([blob])
subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
for action in (
    lambda: Store(root), lambda: store.put(b"new"), lambda: store.ingest(blob, 0), lambda: store.collect([]),
    lambda: store.reserve([Descriptor("", digests.of_bytes(b"other"), 4)]),
):
    try:
        action()
        print("no error")
    except StoreError as error:
        print(error)
"""


def test_a_read_only_disk_is_told_in_one_sentence_whatever_is_done(tmp_path):
    disk_ = tmp_path / "disk"
    lines = run_on(small_disk(disk_, "1m"), READ_ONLY, disk_).splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("the engine store cannot be written: read-only file system")
        assert "mount it for writing" in line


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_bytes_whose_sync_failed_are_dropped_and_never_become_a_blob(tmp_path, monkeypatch):
    store = Store(tmp_path)
    data = b"data"
    wanted = Descriptor("", digests.of_bytes(data), len(data))
    ingest = store.ingest(wanted, 0)
    ingest.write(data)
    monkeypatch.setattr(disk.os, "fsync", failing(errno.EIO))
    with pytest.raises(StoreError, match=r"input/output error.*kernel's log"):
        ingest.commit()
    ingest.close()
    assert files_under(tmp_path) == []


def test_a_blob_that_cannot_be_read_is_bad_and_dropped(tmp_path, monkeypatch):
    store = Store(tmp_path)
    digest = store.put(b"data")
    monkeypatch.setattr(Path, "read_bytes", failing(errno.EIO))
    with pytest.raises(DataLossError, match="cannot be read"):
        store.read(digest)
    assert not store.has(digest)


@pytest.mark.parametrize("how", ["put", "ingest"])
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_anybody_is_told(
    tmp_path, monkeypatch, how
):
    store, data, steps = Store(tmp_path), b"data", []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor):
        mode = os.fstat(descriptor).st_mode
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name} {mode & 0o777:o}")
        fsync(descriptor)

    def noted_rename(path, target):
        steps.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    if how == "put":
        store.put(data)
    else:
        ingest = store.ingest(Descriptor("", digests.of_bytes(data), len(data)), 0)
        ingest.write(data)
        ingest.commit()
        ingest.close()
    file, rename_, directory = steps
    assert file.startswith(f"sync {digests.of_bytes(data).removeprefix('sha256:')}")
    assert file.endswith(" 440")
    assert rename_ == "rename"
    assert directory.startswith("sync sha256")


def manifest_of(store: Store, files: dict[str, bytes]) -> EngineManifest:
    config = b"{}"
    store.put(config)
    layers = [
        Layer(title, "application/octet-stream", store.put(data), len(data)) for title, data in files.items()
    ]
    manifest = EngineManifest.build(
        Descriptor(CONFIG_MEDIA_TYPE, digests.of_bytes(config), len(config)), layers
    )
    store.put(manifest.to_json())
    return manifest


def test_what_a_crash_leaves_is_gone_after_collecting(tmp_path):
    store = Store(tmp_path)
    manifest = manifest_of(store, {"model.onnx": b"graph"})
    store.link(manifest)
    whole = files_under(tmp_path)
    (tmp_path / "ingest" / ("a" * 64)).write_bytes(b"half")
    (tmp_path / "ingest" / ("b" * 64 + ".put")).write_bytes(b"half")
    (tmp_path / "ingest" / ".probe").write_bytes(b"")
    building = tmp_path / "engines" / (manifest.digest.removeprefix("sha256:") + ".new")
    building.mkdir()
    (building / "model.onnx").write_bytes(b"half")
    Store(tmp_path).collect([manifest])
    assert files_under(tmp_path) == whole
    assert not building.exists()


def test_an_engine_with_a_file_missing_is_not_linked_and_keeps_its_old_directory(tmp_path):
    store = Store(tmp_path)
    manifest = manifest_of(store, {"model.onnx": b"graph"})
    directory = store.link(manifest)
    store.drop(digests.of_bytes(b"graph"))
    with pytest.raises(NotFoundError, match=r"model\.onnx"):
        store.link(manifest)
    assert (directory / "model.onnx").read_bytes() == b"graph"


def test_a_blob_that_another_push_has_brought_is_not_brought_again(tmp_path):
    from edgellm_agent.errors import OffsetError

    store = Store(tmp_path)
    digest = store.put(b"data")
    with pytest.raises(OffsetError):
        store.ingest(Descriptor("", digest, 4), 0)
