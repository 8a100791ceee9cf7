"""The publisher on a real broker: birth, will, telemetry, outages."""

import asyncio
import json
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.mqtt.settings import MqttSettings, MqttTlsSettings
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.telemetry.sysfs import SysfsSource
from tests.support import boards
from tests.support.broker import Broker, Listener, Received, find_mosquitto, listening, running_broker

PREFIX = "edgellm/v1/default/default/jetson-01"
ENGINE = "sha256:" + "a" * 64


@pytest.fixture(scope="module", params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with running_broker(request.param) as running:
        yield running


@pytest.fixture
def mosquitto() -> Iterator[Broker]:
    """One of its own, for tests that stop it; MQTT 5 where mosquitto is there."""
    with running_broker() as running:
        yield running


@asynccontextmanager
async def publishing(
    broker: Broker, state_dir: Path, device: str = "jetson-01", **settings: object
) -> AsyncIterator[MqttPublisher]:
    """A whole telemetry over an Orin Nano's files, ten times a second."""
    options = {"protocol": broker.protocols[0], "interval_s": 0.1, "keepalive_s": 5} | settings
    sampler = Sampler(
        SysfsSource(boards.build(state_dir / "root", boards.ORIN_NANO)),
        lambda: telemetry_pb2.Runtime(state="serving", engine=ENGINE),
        interval_s=0.1,
    )
    publisher = MqttPublisher(
        MqttSettings.model_validate({"host": broker.host, "port": broker.port} | options),
        sampler,
        device=device,
        state_dir=state_dir,
        agent_version="0.1.0",
        profile="orin-nano-8gb",
    )
    sampler.start()
    publisher.start()
    try:
        yield publisher
    finally:
        await asyncio.wait_for(publisher.close(), 11)
        await asyncio.wait_for(sampler.close(), 2)


async def receive(listener: Listener, wanted: Callable[[Received], bool], deadline_s: float = 15) -> Received:
    return await asyncio.to_thread(listener.wait_for, wanted, deadline_s)


def is_state(*, online: bool, session: int | None = None) -> Callable[[Received], bool]:
    def wanted(message: Received) -> bool:
        state = message.event.state
        return message.leaf == "state" and state.online == online and session in (None, state.session)

    return wanted


def is_leaf(leaf: str) -> Callable[[Received], bool]:
    return lambda message: message.leaf == leaf


def retained(broker: Broker, topic: str) -> Received:
    with listening(broker, topic) as late:
        return late.wait_for(lambda _: True)


async def test_a_birth_is_retained_and_a_clean_stop_says_goodbye(broker: Broker, tmp_path: Path) -> None:
    with listening(broker) as listener:
        async with publishing(broker, tmp_path, device="birth"):
            born = await receive(listener, is_state(online=True))
            kept = await asyncio.to_thread(retained, broker, "edgellm/v1/default/default/birth/state")
        gone = await receive(listener, is_state(online=False))
    assert (born.qos, born.retain, kept.retain) == (1, False, True)
    assert kept.payload == born.payload
    assert born.event.source == "edgellm/default/default/birth"
    assert born.event.type == "edgellm.state.v1"
    state = fleet_pb2.DeviceState(online=True, session=1, agent_version="0.1.0", profile="orin-nano-8gb")
    assert born.event.state == state
    # Said by the device, not by the broker for it: it has a time, and the will is not sent.
    assert gone.event.HasField("time")
    assert gone.event.state.session == 1
    after = await asyncio.to_thread(retained, broker, "edgellm/v1/default/default/birth/state")
    assert after.payload == gone.payload
    assert (born.event.id, gone.event.id) == ("1-state-1", "1-state-2")


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_telemetry_parses_back_in_each_protocol_and_encoding(
    broker: Broker, tmp_path: Path, protocol: str, encoding: str
) -> None:
    if protocol not in broker.protocols:
        pytest.skip(f"{broker.kind} does not speak MQTT {protocol}")
    with listening(broker, protocol=protocol) as listener:
        async with publishing(broker, tmp_path, protocol=protocol, encoding=encoding, message_expiry_s=60):
            born = await receive(listener, is_state(online=True))
            thermal = await receive(listener, is_leaf("thermal"))
            power = await receive(listener, is_leaf("power"))
            runtime = await receive(listener, is_leaf("runtime"))
    assert thermal.topic == f"{PREFIX}/tele/thermal"
    assert thermal.event.telemetry.thermal.max_celsius == 49.25
    assert power.event.telemetry.power.total_mw == 4959.36
    assert runtime.event.telemetry.runtime.engine == ENGINE
    assert runtime.event.telemetry.memory.available_bytes == 5_321_000 * 1024
    assert runtime.event.telemetry.compute.gpu_percent == 37.5
    assert thermal.event.id == f"{born.event.state.session}-{thermal.event.telemetry.sequence}-thermal"
    assert thermal.event.time == thermal.event.telemetry.time
    # amqtt delivers with the quality that the reader asked for.
    assert {message.qos for message in (thermal, power, runtime)} == {0 if broker.kind == "mosquitto" else 1}
    assert not any(message.retain for message in (thermal, power, runtime))
    types = {"json": "application/json", "protobuf": "application/protobuf; proto=edgellm.v1.Event"}
    assert {message.content_type for message in (born, thermal)} == {
        types[encoding] if protocol == "5" else None
    }
    assert thermal.expiry_s is None if protocol == "3.1.1" else thermal.expiry_s in (59, 60)
    # The state is kept for whoever comes late, however late.
    assert born.expiry_s is None
    if encoding == "json":
        assert json.loads(power.payload)["telemetry"]["power"]["mode"] == "25W"


async def test_telemetry_travels_with_the_quality_that_is_configured(broker: Broker, tmp_path: Path) -> None:
    with listening(broker) as listener:
        async with publishing(broker, tmp_path, qos=1):
            messages = [await receive(listener, is_leaf("thermal")) for _ in range(3)]
    assert [message.qos for message in messages] == [1, 1, 1]
    sequences = [message.event.telemetry.sequence for message in messages]
    assert sequences == sorted(set(sequences))


async def test_a_change_of_engine_is_told_at_once_and_only_then(broker: Broker, tmp_path: Path) -> None:
    with listening(broker, "edgellm/+/+/+/engines/state") as listener:
        async with publishing(broker, tmp_path, device="engines") as publisher:
            await receive(listener, is_state(online=True))
            publisher.update_state(active_engine=ENGINE)
            changed = await receive(listener, is_state(online=True))
            publisher.update_state(active_engine=ENGINE)
        gone = await receive(listener, lambda _: True)
    assert changed.event.state.active_engine == ENGINE
    # Nothing came between: the same engine told twice is no change.
    assert (gone.event.state.online, gone.event.state.active_engine) == (False, "")


AGENT = """
import asyncio, sys
from pathlib import Path
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.telemetry.sysfs import SysfsSource

async def main(settings, folder):
    sampler = Sampler(SysfsSource(Path(folder)))
    publisher = MqttPublisher(MqttSettings.model_validate_json(settings), sampler, device="victim",
                              state_dir=Path(folder), agent_version="0.1.0", active_engine="sha256:0")
    sampler.start()
    publisher.start()
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_agent_leaves_a_retained_will_of_its_session(broker: Broker, tmp_path: Path) -> None:
    topic = "edgellm/v1/default/default/victim/state"
    settings = MqttSettings(host=broker.host, port=broker.port, protocol=broker.protocols[0])  # type: ignore[arg-type]
    with listening(broker, topic) as listener:
        for session in (1, 2):
            agent = await asyncio.create_subprocess_exec(
                sys.executable, "-c", AGENT, settings.model_dump_json(), str(tmp_path)
            )
            try:
                born = await receive(listener, is_state(online=True, session=session))
            finally:
                agent.kill()
                await agent.wait()
            will = await receive(listener, is_state(online=False))
            assert born.event.state.active_engine == "sha256:0"
            assert will.event.state.session == session
            assert will.event.state.agent_version == "0.1.0"
            assert not will.event.HasField("time")
            assert will.qos == 1
            kept = await asyncio.to_thread(retained, broker, topic)
            assert (kept.retain, kept.payload) == (True, will.payload)
            assert kept.content_type == born.content_type


async def test_an_absent_broker_is_no_error_and_is_found_when_it_comes(
    mosquitto: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mosquitto.stop()
    async with publishing(mosquitto, tmp_path) as publisher:
        await asyncio.sleep(1.5)
        assert not publisher.connected
        publisher.update_state(active_engine=ENGINE)
        mosquitto.start()
        with listening(mosquitto) as listener:
            born = await receive(listener, is_state(online=True))
            first = await receive(listener, is_leaf("thermal"))
    # The engine told during the outage is in the birth, and refused dials used up no number.
    assert (born.event.state.session, born.event.state.active_engine) == (1, ENGINE)
    # Nothing of the outage was kept: what comes is now.
    assert first.event.telemetry.sequence > 10
    # An outage is one line, not one per dial.
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [f"mqtt.unreachable host=127.0.0.1 port={mosquitto.port}"]


async def test_after_a_restart_of_the_broker_the_state_comes_again_with_a_new_session(
    mosquitto: Broker, tmp_path: Path
) -> None:
    async with publishing(mosquitto, tmp_path, qos=1) as publisher:
        with listening(mosquitto) as listener:
            await receive(listener, is_state(online=True, session=1))
            await receive(listener, is_leaf("thermal"))
            mosquitto.stop()
            publisher.update_state(active_engine=ENGINE)
            listener.drain()
            mosquitto.start()
            again = await receive(listener, is_state(online=True, session=2))
            thermal = await receive(listener, is_leaf("thermal"))
        kept = await asyncio.to_thread(retained, mosquitto, f"{PREFIX}/state")
    assert again.event.state.active_engine == ENGINE
    assert thermal.event.id.startswith("2-")
    # No state of the session before, sent again by the client, has replaced the new one.
    assert kept.event.state.session == 2


async def test_a_broker_that_stops_reading_does_not_fill_memory_or_stop_sampling(tmp_path: Path) -> None:
    """A listener that accepts, says yes to MQTT 3.1.1 and then never reads again."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = MqttSettings(host="127.0.0.1", port=listener.getsockname()[1], protocol="3.1.1", qos=1)
        sampler = Sampler(SysfsSource(boards.build(tmp_path / "root", boards.ORIN_NANO)), interval_s=0.01)
        publisher = MqttPublisher(
            settings.model_copy(update={"interval_s": 0.01}),
            sampler,
            device="stalled",
            state_dir=tmp_path,
            agent_version="0.1.0",
        )
        sampler.start()
        publisher.start()
        connection, _ = await asyncio.to_thread(listener.accept)
        with connection:
            await asyncio.to_thread(connection.recv, 4096)
            connection.sendall(b"\x20\x02\x00\x00")
            async for record in sampler.records():
                if record.sequence >= 150:
                    break
            waiting = sum(not info.is_published() for info in publisher._in_flight)
            assert publisher.connected
            # One round and no more, though fifty were due: nothing of it was acknowledged.
            assert waiting == 3
            assert len(publisher._client._out_messages) <= 4
            started = time.monotonic()
            await publisher.close(deadline_s=0.5)
            assert time.monotonic() - started < 3
        await sampler.close()


async def test_a_device_without_power_sensors_sends_no_power(broker: Broker, tmp_path: Path) -> None:
    sampler = Sampler(SysfsSource(boards.build(tmp_path, boards.ORIN_NANO)), interval_s=0.1)
    sampler._reader._probes = [probe for probe in sampler._reader._probes if probe.part != "power"]
    settings = MqttSettings(host=broker.host, port=broker.port, protocol=broker.protocols[0], interval_s=0.1)  # type: ignore[arg-type]
    publisher = MqttPublisher(settings, sampler, device="laptop", state_dir=tmp_path, agent_version="0.1.0")
    with listening(broker, "edgellm/v1/default/default/laptop/tele/#") as listener:
        sampler.start()
        publisher.start()
        leaves = {(await receive(listener, lambda _: True)).topic for _ in range(9)}
        await publisher.close()
        await sampler.close()
    assert leaves == {f"edgellm/v1/default/default/laptop/tele/{leaf}" for leaf in ("thermal", "runtime")}


def test_a_password_or_tls_file_that_cannot_be_used_is_told_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    missing, garbage = tmp_path / "missing", tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for settings, message in (
        (MqttSettings(host="localhost", username="u", password_file=missing), "password_file .*missing"),
        (MqttSettings(host="localhost", tls=MqttTlsSettings(ca_file=missing)), "tls files .*missing"),
        (MqttSettings(host="localhost", tls=MqttTlsSettings(cert_file=garbage)), r"tls files .*garbage\.pem"),
    ):
        with pytest.raises(ValueError, match=message):
            publisher_of(settings, tmp_path)


def test_a_password_comes_from_its_file_without_the_line_feed(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret \n")
    publisher = publisher_of(MqttSettings(host="localhost", username="u", password_file=secret), tmp_path)
    assert (publisher._client.username, publisher._client.password) == ("u", "s3cret ")


def publisher_of(settings: MqttSettings, state_dir: Path) -> MqttPublisher:
    sampler = Sampler(SysfsSource(state_dir))
    return MqttPublisher(settings, sampler, device="jetson-01", state_dir=state_dir, agent_version="0.1.0")
