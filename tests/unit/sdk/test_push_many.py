"""One bundle to several devices: each its own end, one command, one account of it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent import futures

import grpc
import pytest

from edgellm.bundle import BundleWriter
from edgellm.client import AsyncClient, Client, RateLimit
from edgellm.devices import Device, DeviceBook
from edgellm.errors import UnknownDeviceError
from edgellm.v1 import device_pb2_grpc, engines_pb2_grpc
from tests.support.agents import wait_for
from tests.support.fake_device import FakeDevice, FakeDeviceService, FakeEngineService, serve
from tests.support.terminal import Terminal
from tests.support.tiny_bundle import make_config, make_files
from tests.unit.sdk.test_cli import run

pytestmark = pytest.mark.usefixtures("home")
NAMES = ("jetson-01", "jetson-02", "jetson-03")


@pytest.fixture
def fleet(home, tmp_path):
    """Three known devices."""
    devices, servers = {}, []
    for name in NAMES:
        address = f"unix://{tmp_path}/{name}.sock"
        devices[name] = FakeDevice()
        servers.append(serve(devices[name], address)[0])
        DeviceBook().add(name, address)
    yield devices
    for device in devices.values():
        device.cancelled.set()
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def line1(monkeypatch):
    """A group of the last two."""

    def group(book, name):
        if name != "line1":
            raise UnknownDeviceError(f"unknown group {name}; known: line1")
        return [book.find(device) for device in NAMES[1:]]

    monkeypatch.setattr(DeviceBook, "group", group, raising=False)


def push(bundle, *args):
    result = run("push", "engine", bundle.path, *args, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.usefixtures("line1")
def test_devices_and_groups_are_pushed_to_each_once(bundle, fleet):
    code, told = push(bundle, "--device", "jetson-02,jetson-01", "--group", "line1")
    assert code == 0
    assert [item["device"] for item in told] == ["jetson-02", "jetson-01", "jetson-03"]
    for name, device in fleet.items():
        assert device.active == bundle.variants[0].digest, name
        assert len(device.uploads) == len(set(device.uploads))
    assert {item["state"] for item in told} == {"active"}


def test_a_device_that_is_named_twice_is_one_device(bundle, fleet):
    code, told = push(bundle, "--device", "jetson-01", "--device", "jetson-01,jetson-01")
    assert (code, told["device"], told["state"]) == (0, "jetson-01", "active")


def test_each_device_gets_the_variant_that_fits_it(tmp_path, fleet):
    with BundleWriter(tmp_path / "b") as writer:
        thor = writer.add(make_files(tmp_path / "1"), make_config("thor-t5000"))
        nano = writer.add(make_files(tmp_path / "2"), make_config("orin-nano-8gb"))
    fleet["jetson-02"].profile = "thor-t5000"
    result = run("push", "engine", tmp_path / "b", "--device", "jetson-01,jetson-02", "--json")
    assert [item["digest"] for item in json.loads(result.stdout)] == [nano, thor]
    assert fleet["jetson-02"].active == thor


def test_a_device_that_fails_stops_no_other_and_is_told_by_its_name(bundle, fleet):
    fleet["jetson-01"].profile = "thor-t5000"
    fleet["jetson-02"].activation_fails = True
    code, told = push(bundle, "--device", ",".join(NAMES))
    assert code == 1
    assert [item["state"] for item in told] == ["failed", "failed", "active"]
    assert told[0]["error"]["code"] == "FAILED_PRECONDITION"
    assert told[1]["error"]["message"] == "the canary failed"
    assert told[1]["sent_bytes"] > 0
    plain = run("push", "engine", bundle.path, "--device", ",".join(NAMES))
    assert plain.exit_code == 1
    assert "error: jetson-01: this engine is for orin-nano-8gb" in plain.stderr
    assert "error: jetson-02: the canary failed" in plain.stderr
    assert [line.split()[:2] for line in plain.stdout.splitlines()[1:]] == [
        ["jetson-01", "failed"],
        ["jetson-02", "failed"],
        ["jetson-03", "active"],
    ]


def test_without_activation_the_engines_are_only_stored(bundle, fleet):
    code, told = push(bundle, "--device", "jetson-01,jetson-02", "--no-activate")
    assert (code, [item["state"] for item in told]) == (0, ["stored", "stored"])
    assert {device.active for device in fleet.values()} == {""}


@pytest.mark.usefixtures("line1")
@pytest.mark.parametrize("wrong", [("--device", "jetson-01,nobody"), ("--group", "line9")])
def test_a_name_that_nobody_knows_ends_it_before_any_push(bundle, fleet, wrong):
    result = run("push", "engine", bundle.path, "--device", "jetson-02", *wrong)
    assert result.exit_code == 1
    assert "unknown" in result.stderr
    assert not any(device.uploads for device in fleet.values())


@pytest.mark.parametrize("rate", ["fast", "5", "-1MB", "1kB", "nan"])
def test_a_rate_that_is_none_is_wrong_usage(bundle, fleet, rate):
    assert run("push", "engine", bundle.path, "--device", "jetson-01", "--max-rate", rate).exit_code == 2


@pytest.mark.parametrize(
    ("text", "rate"), [("5MB", 5e6), ("500 kB/s", 5e5), ("2MiB", 2 << 20), ("1.5mb", 1.5e6), ("20000", 2e4)]
)
def test_rates_are_read_in_the_usual_units(text, rate):
    from edgellm.cli.push import parse_rate

    assert parse_rate(text) == rate


def test_ctrl_c_tells_what_became_of_each_device_and_how_to_go_on(bundle, fleet):
    fleet["jetson-02"].stalls = True
    terminal = Terminal("push", "engine", str(bundle.path), "--device", "jetson-01,jetson-02", size=(24, 200))
    try:
        terminal.wait_for("done")
        terminal.press(b"\x03")
        assert terminal.ended() == 130
        told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.seen)
    finally:
        fleet["jetson-02"].cancelled.set()
        terminal.close()
    rows = [line.split()[:2] for line in told.splitlines()]
    assert ["jetson-01", "active"] in rows
    assert ["jetson-02", "interrupted"] in rows
    assert "run the same command again" in told


class CountingEngineService(FakeEngineService):
    """Remembers how many blobs came at once; each waits until as many are there as are hoped for."""

    def __init__(self, device, hoped_for):
        super().__init__(device)
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        self.barrier = threading.Barrier(hoped_for)

    def WriteBlob(self, request_iterator, context):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self.barrier.wait(10)
            return super().WriteBlob(request_iterator, context)
        finally:
            with self.lock:
                self.running -= 1


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_so_many_blobs_are_on_their_way_at_once_and_no_more(bundle, tmp_path, kind):
    # Five blobs, less the config, which the device has: two rounds of two.
    service = CountingEngineService(FakeDevice(), 2)
    (variant,) = bundle.variants
    config = variant.manifest.config
    service.device.blobs[config.digest] = bundle.blob_path(config.digest).read_bytes()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    engines_pb2_grpc.add_EngineServiceServicer_to_server(service, server)
    device_pb2_grpc.add_DeviceServiceServicer_to_server(FakeDeviceService(service.device), server)
    target = f"unix://{tmp_path}/counting.sock"
    server.add_insecure_port(target)
    server.start()
    try:
        if kind == "sync":
            with Client(target) as client:
                await asyncio.to_thread(client.push, bundle, variant.digest, streams=2)
        else:
            async with AsyncClient(target) as client:
                await client.push(bundle, variant.digest, streams=2)
    finally:
        server.stop(grace=None).wait()
    assert service.most == 2
    assert len(service.device.uploads) == 4


async def test_a_rate_is_shared_by_all_blobs_and_devices(bundle, fleet):
    taken, (variant,) = [], bundle.variants

    class Noted(RateLimit):
        def take(self, count):
            taken.append(count)
            return super().take(count)

    rate = Noted(200_000_000)
    targets = [DeviceBook().find(name).target for name in NAMES]
    with Client(targets[0]) as client:
        await asyncio.to_thread(client.push, bundle, variant.digest, rate=rate)
    async with AsyncClient(targets[1]) as client:
        await client.push(bundle, variant.digest, rate=rate)
    assert sum(taken) == 2 * variant.manifest.size_bytes


async def test_a_slow_rate_cuts_blobs_into_small_pieces(bundle, fleet):
    pieces, (variant,) = [], bundle.variants

    class Unhurried(RateLimit):
        def take(self, count):
            pieces.append(count)
            return 0.0

    async with AsyncClient(DeviceBook().find("jetson-01").target) as client:
        await client.push(bundle, variant.digest, rate=Unhurried(1_000_000))
    assert max(pieces) == 100_000


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_push_over_a_link_that_comes_back_ends_well_by_itself(bundle, fleet, kind):
    device = fleet["jetson-01"]
    (variant,) = bundle.variants
    weights = max(variant.manifest.layers, key=lambda layer: layer.size_bytes).digest
    device.cut_after_bytes[weights] = 1 << 20
    target = Device("x", DeviceBook().find("jetson-01").target).target
    seen = []
    if kind == "sync":
        with Client(target) as client:
            pushing = asyncio.create_task(asyncio.to_thread(client.push, bundle, variant.digest, seen.append))
            result = await mended(device, pushing)
    else:
        async with AsyncClient(target) as client:
            pushing = asyncio.create_task(client.push(bundle, variant.digest, seen.append))
            result = await mended(device, pushing)
    first, again = [offset for digest, offset in device.uploads if digest == weights]
    assert first == 0
    assert again > 1 << 20
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert result.sent_bytes >= variant.manifest.size_bytes


async def mended(device, pushing):
    await asyncio.to_thread(wait_for, lambda: device.link_down, "the cut")
    device.link_down = False
    return await pushing
