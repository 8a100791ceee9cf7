"""The store is read again and again, slowly; what is bad is found, dropped, and told."""

import asyncio
import errno
import logging
import os

import pytest

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import CONFIG_MEDIA_TYPE, Descriptor, EngineManifest, Layer
from edgellm_agent.store import Store, StoreSettings
from edgellm_agent.store.scrub import Scrubber

MIB = 1 << 20
# Three pieces, the last of them short and of no whole block.
WEIGHTS = os.urandom(2 * MIB + 12_345)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def manifest(store):
    config = b"{}"
    layers = [
        Layer(title, "application/octet-stream", store.put(data), len(data))
        for title, data in {"model.onnx": b"graph", "weights.bin": WEIGHTS}.items()
    ]
    found = EngineManifest.build(Descriptor(CONFIG_MEDIA_TYPE, store.put(config), len(config)), layers)
    store.put(found.to_json())
    return found


class Time:
    """Sleeps that take no time, but are remembered."""

    def __init__(self):
        self.slept_s = []
        self.on_sleep = lambda: None

    async def sleep(self, seconds):
        self.slept_s.append(seconds)
        self.on_sleep()
        await asyncio.sleep(0)


def scrubber(store, manifest, bad=None, time=None, **settings):
    return Scrubber(
        store,
        StoreSettings(**settings),
        lambda: [manifest],
        [].append if bad is None else bad.append,
        (time or Time()).sleep,
    )


def damage(store, digest):
    path = store.blob_path(digest)
    path.chmod(0o640)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 1)
        file.write(b"?")


async def test_a_store_that_is_whole_is_read_to_the_last_byte(store, manifest):
    result = await scrubber(store, manifest).scrub()
    assert result.blobs == 4
    assert result.read_bytes == manifest.size_bytes + len(manifest.to_json())
    assert result.bad == ()


async def test_a_changed_byte_is_found_told_and_dropped_and_the_rest_stays(store, manifest):
    bad, weights = [], digests.of_bytes(WEIGHTS)
    damage(store, weights)
    result = await scrubber(store, manifest, bad).scrub()
    assert result.bad == (weights,)
    assert bad == [weights]
    assert [blob.digest for blob, _ in store.missing(manifest.blobs())] == [weights]


async def test_the_engine_that_runs_keeps_its_file_and_its_next_start_has_the_good_one(store, manifest):
    weights = digests.of_bytes(WEIGHTS)
    running = store.link(manifest)
    damage(store, weights)
    with (running / "weights.bin").open("rb") as mapped:
        await scrubber(store, manifest).scrub()
        assert (running / "weights.bin").stat().st_size == len(WEIGHTS)
        ingest = store.ingest(Descriptor("", weights, len(WEIGHTS)), 0)
        ingest.write(WEIGHTS)
        ingest.commit()
        ingest.close()
        assert os.fstat(mapped.fileno()).st_ino != store.blob_path(weights).stat().st_ino
        assert (store.link(manifest) / "weights.bin").read_bytes() == WEIGHTS
        assert mapped.read() != WEIGHTS


async def test_a_blob_that_was_brought_anew_meanwhile_is_not_dropped_for_the_old_one(store, manifest):
    bad, time, weights = [], Time(), digests.of_bytes(WEIGHTS)
    damage(store, weights)

    def bring():
        # After a whole piece: only the weights have one, so it is their old file that is being read.
        if time.slept_s[-1] > 0.05 and store.blob_path(weights).read_bytes() != WEIGHTS:
            store.drop(weights)
            store.put(WEIGHTS)

    time.on_sleep = bring
    await scrubber(store, manifest, bad, time).scrub()
    assert bad == []
    assert store.has(weights)


async def test_a_blob_that_is_gone_by_now_is_no_damage(store, manifest):
    bad = []
    store.drop(digests.of_bytes(b"graph"))
    assert (await scrubber(store, manifest, bad).scrub()).bad == ()
    assert bad == []


async def test_a_blob_that_the_disk_cannot_read_is_bad(store, manifest, monkeypatch):
    def fail(descriptor, buffers):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    bad = []
    monkeypatch.setattr(os, "readv", fail)
    await scrubber(store, manifest, bad).scrub()
    assert len(bad) == 4


async def test_it_reads_no_faster_than_it_may(store, manifest, monkeypatch):
    time = Time()
    monkeypatch.setattr("edgellm_agent.store.scrub.time.monotonic", lambda: 0.0)
    result = await scrubber(store, manifest, time=time, scrub_bytes_per_s=MIB).scrub()
    assert sum(time.slept_s) == pytest.approx(result.read_bytes / MIB)
    assert max(time.slept_s) <= 1.0


async def test_it_reads_where_no_file_can_be_opened_past_the_cache(store, manifest, monkeypatch):
    real = os.open

    def no_direct(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", no_direct)
    damage(store, digests.of_bytes(WEIGHTS))
    assert (await scrubber(store, manifest).scrub()).bad == (digests.of_bytes(WEIGHTS),)


class Hours(Time):
    """Time that stands still after some long sleeps."""

    def __init__(self, most):
        super().__init__()
        self.hours = []
        self._most = most
        self.enough = asyncio.Event()

    async def sleep(self, seconds):
        if seconds >= 1:
            self.hours.append(seconds / 3600)
            if len(self.hours) == self._most:
                self.enough.set()
                await asyncio.Event().wait()
        await asyncio.sleep(0)


async def test_it_begins_an_hour_after_the_start_and_comes_back_every_day_whatever_fails(
    store, manifest, caplog
):
    time, asked = Hours(3), []

    def manifests():
        asked.append(True)
        if len(asked) == 1:
            raise RuntimeError("no list today")
        return [manifest]

    loop = Scrubber(store, StoreSettings(), manifests, lambda _: None, time.sleep)
    with caplog.at_level(logging.ERROR):
        loop.start()
        await time.enough.wait()
        await loop.close()
    assert time.hours == [1, 24, 24]
    assert "no list today" in caplog.text
    assert loop.last is not None


async def test_an_interval_of_0_means_never(store, manifest):
    time = Hours(1)
    loop = Scrubber(store, StoreSettings(scrub_interval_h=0), lambda: [manifest], lambda _: None, time.sleep)
    loop.start()
    await asyncio.sleep(0)
    await loop.close()
    assert time.hours == []
