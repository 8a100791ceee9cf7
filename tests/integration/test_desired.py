"""A device that does what its fleet desires: the real manager, store and registry, a real server of files."""

import asyncio
import contextlib
import dataclasses
import json
from random import Random

import pytest

from edgellm_agent.access.fleet import Fleet
from edgellm_agent.desired.controller import DesiredController
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.errors import BusyError, EngineError, PreconditionError
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.store.scrub import Scrubber
from edgellm_agent.store.settings import StoreSettings
from tests.support.agents import wait_for
from tests.support.desired_device import (
    NOW_NS,
    TOPICS,
    FakeUplink,
    StillManager,
    install,
    make_layout,
    make_manager,
)
from tests.support.range_server import Answer, range_server
from tests.support.small_disk import let_free, taken

# What a fetch holds before it writes, a read of the network more.
PIECE_BYTES = (256 + 64) << 10


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Two engines on one server: its root, and their digests."""
    root = tmp_path_factory.mktemp("layouts")
    _, first = make_layout(root / "first")
    _, second = make_layout(root / "second", name="second", weights=b"other weights" * 10_000)
    return root, first, second


@pytest.fixture
def server(layouts):
    with range_server(layouts[0]) as running:
        yield running


class Device:
    """A device's controller and what is around it; `restart` is what a power cut leaves."""

    def __init__(self, root, sources, kind=StillManager, **settings):
        self.root = root
        self.kind = kind
        self.settings = DesiredSettings(
            sources=sources, **{"retry_first_s": 0.01, "retry_longest_s": 1, "stall_s": 10, **settings}
        )
        self.begin()

    def begin(self):
        self.uplink = FakeUplink()
        self.manager = make_manager(self.root / "state", self.kind)
        self.events = []
        self.manager.events.listen(self.events.append)
        self.controller = DesiredController(self.settings, self.manager, self.uplink, Fleet("operator"))

    async def start(self):
        self.manager.settle()
        await self.manager.start()
        self.controller.start()
        return self

    async def restart(self):
        await self.stop()
        self.begin()
        await self.start()

    async def stop(self):
        await self.controller.close()
        await self.manager.close()

    def desire(self, *arguments):
        self.uplink.desire(*arguments)

    async def until_fetched(self, count):
        """Until so many bytes of a blob have come; a piece of them may not be on the disk yet."""
        ingests = self.root / "state" / "ingest"

        def have_come():
            return any(path.stat().st_size >= count - PIECE_BYTES for path in ingests.iterdir())

        await asyncio.to_thread(wait_for, have_come, f"{count} bytes")

    def push(self, bundle, digest):
        """As over the device's own API."""
        install(self.manager, bundle, digest)

    @property
    def told(self):
        return [(event.what, event.origin, event.generation) for event in self.events]


@pytest.fixture
async def device(tmp_path, server):
    made = await Device(tmp_path, [f"{server.url}/"]).start()
    yield made
    await made.stop()


def answering(status):
    return lambda asked, answer: Answer(status, {}, b"")


def gone_on_from(server):
    (offset,) = (request.offset for request in server.asked if request.offset)
    return offset


def stalls_after(count):
    """Large files stop coming after so many bytes."""
    return lambda asked, answer: (
        dataclasses.replace(answer, stall_after=count) if len(answer.body) > count else answer
    )


def source(server, name):
    return f"{server.url}/{name}"


def push_locally(device, tmp_path, name="local"):
    bundle, digest = make_layout(tmp_path / name, name=name, weights=name.encode() * 1000)
    device.push(bundle, digest)
    return digest


async def test_a_device_converges_to_what_is_desired(device, server, layouts):
    _, first, _ = layouts
    assert device.uplink.reported.phase == "NONE"
    device.desire(1, first, source(server, "first"))
    reported = await device.uplink.until_phase("CONVERGED")
    assert device.uplink.phases == ["NONE", "FETCHING", "ACTIVATING", "PROVING", "CONVERGED"]
    assert (reported.observed_generation, reported.desired_engine) == (1, first)
    assert (reported.active_engine, reported.active_name) == (first, "tiny-int4")
    assert list(reported.engines) == [first]
    assert not reported.overridden
    assert device.manager.active_digest() == first
    told = ["FETCHED", "ACTIVATED", "COMMITTED"]
    assert device.told == [(what, "desired", 1) for what in told]
    event = device.uplink.retained[TOPICS.reported]
    assert (event.type, event.source, event.run) == ("edgellm.reported.v1", TOPICS.source, 7)
    assert event.id == f"7-reported-{event.sequence}"
    assert event.time.ToNanoseconds() == NOW_NS


async def test_an_engine_that_is_on_the_device_needs_no_source(device, server, layouts):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    device.desire(2, second, source(server, "second"))
    await device.uplink.until(lambda: device.uplink.reported.active_engine == second)
    asked = len(server.asked)
    device.desire(3, first)
    await device.uplink.until(lambda: device.uplink.reported.active_engine == first)
    assert len(server.asked) == asked


async def test_an_engine_that_is_nowhere_is_refused(device, layouts):
    device.desire(1, layouts[1])
    reported = await device.uplink.until_phase("REFUSED")
    assert "no source is given" in reported.error
    assert device.told == [("REFUSED", "desired", 1)]


@pytest.mark.parametrize(
    "place", ["https://elsewhere.example/first", "file:///etc", "{url}/../x", "{url}x/first"]
)
async def test_a_source_that_is_not_on_the_list_is_refused(device, server, layouts, place):
    device.desire(1, layouts[1], place.format(url=server.url))
    reported = await device.uplink.until_phase("REFUSED")
    assert "source" in reported.error
    assert server.asked == []


async def test_without_a_list_nothing_is_fetched(tmp_path, server, layouts):
    device = await Device(tmp_path, []).start()
    device.desire(1, layouts[1], source(server, "first"))
    assert "allow-list" in (await device.uplink.until_phase("REFUSED")).error
    await device.stop()


async def test_what_may_pass_is_tried_again_until_it_has_passed(device, server, layouts):
    server.turns = [answering(status) for status in (503, 404, 500)]
    device.desire(1, layouts[1], source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    assert device.uplink.phases.count("RETRYING") == 3
    assert device.uplink.reported.error == ""


async def test_wrong_bytes_fail_the_generation_and_a_higher_one_is_tried(device, server, layouts):
    _, first, _ = layouts
    server.always = lambda asked, answer: dataclasses.replace(answer, body=answer.body[::-1])
    device.desire(1, first, source(server, "first"))
    reported = await device.uplink.until_phase("FAILED")
    assert "digest" in reported.error
    assert device.told == [("FAILED", "desired", 1)]
    server.always = None
    device.desire(2, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")


async def test_a_failed_generation_is_not_tried_again_after_a_restart(device, server, layouts):
    server.always = lambda asked, answer: Answer(403, {}, b"")
    device.desire(1, layouts[1], source(server, "first"))
    await device.uplink.until_phase("FAILED")
    asked = len(server.asked)
    await device.restart()
    device.desire(1, layouts[1], source(server, "first"))
    assert device.uplink.reported.phase == "FAILED"
    assert "403" in device.uplink.reported.error
    assert len(server.asked) == asked


async def test_what_was_refused_is_judged_again_after_a_restart(device, server, layouts):
    device.desire(1, layouts[1], source(server, "first").replace("localhost", "127.0.0.1"))
    await device.uplink.until_phase("REFUSED")
    device.settings = device.settings.model_copy(
        update={"sources": (server.url.replace("localhost", "127.0.0.1"),)}
    )
    await device.restart()
    await device.uplink.until_phase("CONVERGED")


async def test_an_activation_that_fails_leaves_the_old_engine(device, server, layouts):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")

    async def fail(_digest):
        raise EngineError("no first token")

    device.manager.rack.before_load = fail
    device.desire(2, second, source(server, "second"))
    reported = await device.uplink.until_phase("FAILED")
    assert reported.error == "no first token"
    assert (reported.active_engine, reported.observed_generation) == (first, 2)
    assert device.manager.active_digest() == first
    assert device.told[-1] == ("FAILED", "desired", 2)


async def test_bytes_that_were_changed_on_disk_are_fetched_again(device, server, layouts):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    device.desire(2, second, source(server, "second"))
    await device.uplink.until(lambda: device.uplink.reported.active_engine == second)
    manifest = device.manager.find(first).manifest
    path = device.manager.store.blob_path(manifest.layers[0].digest)
    path.chmod(0o640)
    path.write_bytes(b"changed")
    device.desire(3, first, source(server, "first"))
    await device.uplink.until(lambda: device.uplink.reported.active_engine == first)
    device.manager.store.verify(manifest)


async def test_a_higher_generation_stops_a_fetch_and_what_came_of_it_stays(device, server, layouts):
    _, first, second = layouts
    server.always = stalls_after(1 << 20)
    device.desire(1, first, source(server, "first"))
    await device.until_fetched(1 << 20)
    device.desire(2, second, source(server, "second"))
    await device.uplink.until_phase("CONVERGED")
    assert device.manager.active_digest() == second
    server.always = None
    device.desire(3, first, source(server, "first"))
    await device.uplink.until(lambda: device.uplink.reported.active_engine == first)
    assert gone_on_from(server) >= (1 << 20) - PIECE_BYTES


async def test_a_higher_generation_waits_for_an_activation(device, server, layouts):
    _, first, second = layouts
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_digest):
        loading.set()
        await go_on.wait()

    device.manager.rack.before_load = hold
    device.desire(1, first, source(server, "first"))
    await asyncio.wait_for(loading.wait(), 20)
    device.desire(2, second, source(server, "second"))
    assert device.uplink.reported.observed_generation == 2
    go_on.set()
    await device.uplink.until_phase("CONVERGED")
    assert [generation for what, _, generation in device.told if what == "ACTIVATED"] == [1, 2]


async def test_a_local_activation_overrides_until_a_higher_generation(device, server, layouts, tmp_path):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    local = push_locally(device, tmp_path)
    await device.manager.activate(local)
    reported = device.uplink.reported
    assert (reported.phase, reported.overridden, reported.active_engine) == ("OVERRIDDEN", True, local)
    await device.restart()
    assert device.uplink.reported.phase == "OVERRIDDEN"
    device.desire(2, second, source(server, "second"))
    reported = await device.uplink.until_phase("CONVERGED")
    assert not reported.overridden
    assert device.manager.active_digest() == second


async def test_a_local_activation_stops_a_fetch(device, server, layouts, tmp_path):
    server.always = lambda asked, answer: dataclasses.replace(answer, stall_after=0)
    device.desire(1, layouts[1], source(server, "first"))
    assert await asyncio.to_thread(server.stalled.wait, 20)
    fetching = device.controller._task
    local = push_locally(device, tmp_path)
    await device.manager.activate(local)
    assert device.uplink.reported.phase == "OVERRIDDEN"
    await asyncio.wait([fetching], timeout=20)
    assert fetching.cancelled()
    assert device.manager.active_digest() == local


async def test_a_pinned_device_waits_and_converges_once_unpinned(device, server, layouts):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    device.manager.pin(True)
    assert device.uplink.reported.pinned
    device.desire(2, second, source(server, "second"))
    assert device.uplink.reported.phase == "PINNED"
    await device.restart()
    assert (device.uplink.reported.phase, device.manager.active_digest()) == ("PINNED", first)
    device.manager.pin(False)
    await device.uplink.until_phase("CONVERGED")
    assert device.manager.active_digest() == second
    assert ("UNPINNED", "local", 0) in device.told


async def test_a_pin_holds_against_an_activation_that_is_under_way(device, server, layouts):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_digest):
        loading.set()
        await go_on.wait()

    device.manager.rack.before_load = hold
    device.desire(2, second, source(server, "second"))
    await asyncio.wait_for(loading.wait(), 20)
    device.manager.pin(True)
    go_on.set()
    await device.manager.idle()
    assert device.manager.active_digest() == first
    assert device.uplink.reported.phase == "PINNED"
    device.manager.rack.before_load = None
    device.manager.pin(False)
    await device.uplink.until_phase("CONVERGED")
    assert device.manager.active_digest() == second


async def test_a_device_that_is_unpinned_before_the_activation_has_ended_goes_on(device, server, layouts):
    _, first, second = layouts
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    loading, go_on = asyncio.Event(), asyncio.Event()
    reloading, reloaded = asyncio.Event(), asyncio.Event()

    async def hold(_digest):
        loading.set()
        await go_on.wait()

    async def reload():
        reloading.set()
        await reloaded.wait()

    device.manager.rack.before_load = hold
    device.manager.rack.restore = reload
    device.desire(2, second, source(server, "second"))
    await asyncio.wait_for(loading.wait(), 20)
    device.manager.pin(True)
    go_on.set()
    await asyncio.wait_for(reloading.wait(), 20)
    device.manager.pin(False)
    reloaded.set()
    await device.uplink.until_phase("CONVERGED", "FAILED")
    assert device.manager.active_digest() == second
    assert "FAILED" not in [what for what, _, _ in device.told]


async def test_a_restart_of_the_engine_needs_one_and_its_turn(device, layouts, server):
    with pytest.raises(PreconditionError, match="no engine is running"):
        await device.manager.restart()
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_digest):
        loading.set()
        await go_on.wait()

    device.manager.rack.before_load = hold
    device.desire(1, layouts[1], source(server, "first"))
    await asyncio.wait_for(loading.wait(), 20)
    with pytest.raises(BusyError, match="under way"):
        await device.manager.restart()
    go_on.set()
    await device.uplink.until_phase("CONVERGED")


async def test_an_equal_generation_with_another_engine_is_reported(device, server, layouts):
    _, first, second = layouts
    device.desire(5, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    device.desire(5, second, source(server, "second"))
    reported = device.uplink.reported
    assert (reported.phase, reported.desired_engine) == ("CONVERGED", first)
    assert second in reported.error
    device.desire(4, second, source(server, "second"))
    assert device.manager.active_digest() == first


HOSTILE = [
    b"{",
    b"\xff\xfe",
    b"[]",
    b'{"desired": []}',
    b'{"desired": {"generation": "-1"}}',
    b'{"desired": {"generation": 1e400}}',
    b'{"desired": {"generation": "18446744073709551615", "engine": "sha256:' + b"a" * 64 + b'"}}',
    b'{"desired": {"generation": 1, "engine": "latest"}}',
    b'{"state": {"online": true}}',
    b'{"desired": ' * 5000,
    b"x" * 100_000,
    json.dumps({"desired": {"generation": 1, "engine": "sha256:" + "a" * 64, "source": "s" * 5000}}).encode(),
]


@pytest.mark.parametrize("payload", HOSTILE, ids=range(len(HOSTILE)))
async def test_what_nobody_could_have_meant_is_ignored(device, payload, caplog):
    device.controller.take(payload)
    assert device.uplink.reported.phase == "NONE"
    assert "desired.ignored" in caplog.text


async def test_a_removed_desire_changes_nothing(device, server, layouts):
    device.desire(1, layouts[1], source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    device.controller.take(b"")
    assert device.uplink.reported.phase == "CONVERGED"


async def test_progress_is_told_while_an_engine_is_fetched(tmp_path, server, layouts):
    device = await Device(tmp_path, [server.url], report_interval_s=0.1).start()
    server.always = stalls_after(2 << 20)
    device.desire(1, layouts[1], source(server, "first"))
    await device.uplink.until(lambda: device.uplink.reported.fetched_bytes > 1 << 20)
    assert device.uplink.reported.total_bytes > 3 << 20
    assert device.uplink.reported.phase == "FETCHING"
    await device.stop()


async def test_a_restart_in_a_fetch_goes_on_with_it(device, server, layouts):
    _, first, _ = layouts
    server.always = stalls_after(2 << 20)
    device.desire(1, first, source(server, "first"))
    await device.until_fetched(2 << 20)
    server.always = None
    await device.restart()
    await device.uplink.until_phase("CONVERGED")
    assert gone_on_from(server) >= (2 << 20) - PIECE_BYTES


async def test_a_real_engine_is_fetched_activated_and_answers(tmp_path, tiny):
    (variant,) = tiny.variants
    with range_server(tiny.path) as server:
        device = await Device(tmp_path, [server.url], kind=EngineManager).start()
        try:
            device.desire(1, variant.digest, server.url)
            await device.uplink.until_phase("CONVERGED", "FAILED")
            assert device.uplink.reported.error == ""
            assert device.manager.running is not None
            worker = device.manager.running.worker_pid
            await device.manager.restart()
            assert device.manager.running.state == "serving"
            assert device.manager.running.worker_pid != worker
        finally:
            await device.stop()


async def test_what_is_done_to_engines_on_the_device_itself_is_told(device, tmp_path):
    first = push_locally(device, tmp_path, "one")
    second = push_locally(device, tmp_path, "two")
    await device.manager.activate(first)
    await device.manager.activate(second)
    device.manager.remove(first)
    device.manager.pin(True)
    device.manager.pin(True)

    async def fail(_digest):
        raise EngineError("no first token")

    third = push_locally(device, tmp_path, "three")
    device.manager.rack.before_load = fail
    with pytest.raises(EngineError):
        await device.manager.activate(third)
    seen = [(event.what, event.engine, event.previous, event.error) for event in device.events]
    assert {event.origin for event in device.events} == {"local"}
    assert seen == [
        ("PUSHED", first, "", ""),
        ("PUSHED", second, "", ""),
        ("ACTIVATED", first, "", ""),
        ("COMMITTED", first, "", ""),
        ("ACTIVATED", second, first, ""),
        ("COMMITTED", second, first, ""),
        ("REMOVED", first, "", ""),
        ("PINNED", second, "", ""),
        ("PUSHED", third, "", ""),
        ("FAILED", third, second, "no first token"),
    ]
    assert device.uplink.reported.pinned
    assert sorted(device.uplink.reported.engines) == sorted([second, third])


async def test_the_start_of_the_agent_is_nobodys_wish(device, tmp_path):
    local = push_locally(device, tmp_path)
    await device.manager.activate(local)
    await device.restart()
    assert device.manager.running is not None
    assert device.told == []


@pytest.mark.parametrize("seed", range(8))
async def test_after_any_sequence_a_device_with_a_source_converges_or_says_why_not(
    tmp_path, layouts, seed, server
):
    random = Random(seed)
    _, first, second = layouts
    names = {first: "first", second: "second"}
    device = await Device(tmp_path, [server.url], retry_longest_s=1).start()
    local = push_locally(device, tmp_path)
    generation = 0

    async def fetch_fails():
        server.always = random.choice([answering(503), answering(403), None])

    async def desire():
        nonlocal generation
        generation += random.choice([0, 1, 1])
        engine = random.choice([first, second])
        device.desire(max(generation, 1), engine, source(server, names[engine]))
        generation = max(generation, 1)

    async def activate():
        with contextlib.suppress(BusyError):
            await device.manager.activate(local)

    async def pin():
        active = device.manager.active_digest()
        device.manager.pin(True)
        await breathe()
        assert device.manager.active_digest() == active

    async def unpin():
        device.manager.pin(False)

    async def breathe():
        for _ in range(random.randrange(200)):
            await asyncio.sleep(0)

    for _ in range(25):
        before = device.controller.state.generation
        await random.choice([fetch_fails, desire, desire, activate, pin, unpin, device.restart, breathe])()
        assert device.controller.state.generation >= before
    server.always = None
    settled = {"NONE", "CONVERGED", "OVERRIDDEN", "PINNED", "FAILED"}
    reported = await device.uplink.until_phase(*settled)
    assert reported.observed_generation == generation
    assert reported.active_engine == (device.manager.active_digest() or "")
    expected = {
        "CONVERGED": reported.active_engine == reported.desired_engine,
        "OVERRIDDEN": reported.overridden and reported.active_engine == local,
        "PINNED": reported.pinned,
        "FAILED": "403" in reported.error,
        "NONE": generation == 0,
    }
    assert expected[reported.phase]
    if not reported.pinned:
        # Whatever was, a higher generation with a source that answers is reached.
        device.desire(generation + 1, first, source(server, "first"))
        assert (await device.uplink.until_phase("CONVERGED", "FAILED")).active_engine == first
    await device.stop()


async def test_when_the_disk_is_full_the_oldest_engine_of_the_fleet_makes_way(device, tmp_path, monkeypatch):
    local = push_locally(device, tmp_path, "mine")
    store = device.manager.store
    before = taken(store)
    made = [
        make_layout(tmp_path / name, name=name, weights=name.encode() * 100_000)
        for name in ("e1", "e2", "e3")
    ]
    one = max(bundle.manifest(digest).size_bytes for bundle, digest in made)
    # A disk for two and a half engines.
    let_free(monkeypatch, lambda: before + one * 5 // 2 - taken(store))
    with range_server(tmp_path) as server:
        device.controller._settings = DesiredSettings(sources=[server.url])
        for generation, (bundle, digest) in enumerate(made, start=1):
            device.desire(generation, digest, source(server, bundle.path.name))
            await device.uplink.until(lambda digest=digest: device.uplink.reported.active_engine == digest)
    first, second, third = (digest for _, digest in made)
    assert sorted(engine.digest for engine in device.manager.engines()) == sorted([local, second, third])
    assert ("REMOVED", "desired", 3) in device.told
    assert [event.engine for event in device.events if event.what == "REMOVED"] == [first]


async def test_neither_the_active_engine_nor_one_of_the_devices_own_makes_way(
    device, tmp_path, monkeypatch, server, layouts
):
    _, first, second = layouts
    local = push_locally(device, tmp_path, "mine")
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    let_free(monkeypatch, lambda: 1000)
    device.desire(2, second, source(server, "second"))
    assert "are free on the device's disk" in (await device.uplink.until_phase("REFUSED")).error
    assert [engine.digest for engine in device.manager.engines()] == [local, first]


@pytest.mark.parametrize("what", ["weights", "manifest", "config"])
async def test_a_file_that_rots_on_the_disk_is_found_and_fetched_again_while_the_engine_goes_on(
    device, server, layouts, what
):
    _, first, _ = layouts
    manager = device.manager
    device.desire(1, first, source(server, "first"))
    await device.uplink.until_phase("CONVERGED")
    running, manifest = manager.running, manager.find(first).manifest
    weights = max(manifest.layers, key=lambda layer: layer.size_bytes)
    digests = {"weights": weights.digest, "manifest": first, "config": manifest.config.digest}
    path = manager.store.blob_path(digests[what])
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(b"rotten")
    scrubber = Scrubber(manager.store, StoreSettings(), lambda: [manifest], manager.library.damaged)
    await scrubber.scrub()
    await device.uplink.until(lambda: ("FETCHED", "desired", 1) in device.told[2:])
    await device.uplink.until_phase("CONVERGED")
    assert [what for what, _, _ in device.told[3:]] == ["DAMAGED", "FETCHED", "ACTIVATED"]
    manager.store.verify(manager.find(first).manifest)
    linked = manager.store.link(manifest) / weights.title
    assert linked.read_bytes() == manager.store.blob_path(weights.digest).read_bytes()
    assert manager.running is running
