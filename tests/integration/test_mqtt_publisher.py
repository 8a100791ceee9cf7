"""The publisher on a real broker that is there: birth, will, telemetry, events, messages to the device."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgellm.v1 import fleet_pb2
from edgellm_agent.events import Events
from edgellm_agent.mqtt.base import MAX_PAYLOAD_BYTES, MessageProperties
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.mqtt.settings import MqttSettings, MqttTlsSettings
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.telemetry.sysfs import SysfsSource
from tests.support import boards
from tests.support.broker import Broker, find_mosquitto, listening, running_broker
from tests.support.publishing import (
    ENGINE,
    PREFIX,
    agent_process,
    is_leaf,
    is_live,
    is_state,
    publishing,
    receive,
    retained,
    settings_for,
    until,
    worker_ended,
)


@pytest.fixture(scope="module", params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    with running_broker(request.param) as running:
        yield running


async def test_a_birth_is_retained_and_a_clean_stop_says_goodbye(broker: Broker, tmp_path: Path) -> None:
    topic = "edgellm/v1/default/default/birth/state"
    with listening(broker, topic) as listener:
        async with publishing(settings_for(broker), tmp_path, device="birth"):
            born = await receive(listener, is_state(online=True))
            kept = await asyncio.to_thread(retained, broker, topic)
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
    after = await asyncio.to_thread(retained, broker, topic)
    assert after.payload == gone.payload
    assert (born.event.id, gone.event.id) == ("1-state-1", "1-state-2")


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_telemetry_parses_back_in_each_protocol_and_encoding(
    broker: Broker, tmp_path: Path, protocol: str, encoding: str
) -> None:
    if protocol not in broker.protocols:
        pytest.skip(f"{broker.kind} does not speak MQTT {protocol}")
    settings = settings_for(broker, protocol=protocol, encoding=encoding, message_expiry_s=60)
    with listening(broker, f"{PREFIX}/#", protocol=protocol) as listener:
        async with publishing(settings, tmp_path) as publisher:
            born = await receive(listener, is_state(online=True))
            thermal = await receive(listener, is_live(publisher, "thermal"))
            power = await receive(listener, is_leaf("power"))
            runtime = await receive(listener, is_leaf("runtime"))
    assert thermal.topic == f"{PREFIX}/tele/thermal"
    assert thermal.event.telemetry.thermal.max_celsius == 49.25
    assert power.event.telemetry.power.total_mw == 4959.4
    assert runtime.event.telemetry.runtime.engine == ENGINE
    assert runtime.event.telemetry.memory.available_bytes == 5_321_000 * 1024
    assert runtime.event.telemetry.compute.gpu_percent == 37.5
    assert thermal.event.id == f"1-telemetry.thermal-{thermal.event.telemetry.sequence}"
    assert (thermal.event.run, thermal.event.sequence) == (1, thermal.event.telemetry.sequence)
    assert thermal.event.time == thermal.event.telemetry.time
    assert not any(message.retain for message in (thermal, power, runtime))
    types = {"json": "application/json", "protobuf": "application/protobuf; proto=edgellm.v1.Event"}
    expected = types[encoding] if protocol == "5" else None
    assert {message.content_type for message in (born, thermal)} == {expected}
    assert thermal.expiry_s is None if protocol == "3.1.1" else thermal.expiry_s in (59, 60)
    # The state is kept for whoever comes late, however late.
    assert born.expiry_s is None
    if encoding == "json":
        assert json.loads(power.payload)["telemetry"]["power"]["mode"] == "25W"


@pytest.mark.parametrize("qos", [0, 1])
async def test_live_telemetry_travels_with_the_quality_that_is_configured(
    broker: Broker, tmp_path: Path, qos: int
) -> None:
    if broker.kind == "amqtt":
        pytest.skip("amqtt delivers with the quality that the reader asked for")
    with listening(broker, f"{PREFIX}/tele/#") as listener:
        async with publishing(settings_for(broker, qos=qos), tmp_path) as publisher:
            await receive(listener, is_leaf("thermal"))
            messages = [await receive(listener, is_live(publisher, "thermal")) for _ in range(3)]
    assert [message.qos for message in messages] == [qos] * 3
    sequences = [message.event.telemetry.sequence for message in messages]
    assert sequences == sorted(set(sequences))


async def test_what_does_not_move_is_told_once_and_a_new_connection_begins_with_everything(
    broker: Broker, tmp_path: Path
) -> None:
    with listening(broker, f"{PREFIX}/#") as listener:
        async with publishing(settings_for(broker, max_silence_s=3600), tmp_path) as publisher:
            await receive(listener, is_leaf("runtime"))
            publisher.happened(worker_ended(1))
            between = []
            while not between or between[-1].leaf != "worker":
                between.append(await receive(listener, lambda _: True))
            zone = tmp_path / "root/sys/class/thermal/thermal_zone8/temp"
            zone.write_text("51000\n")
            warmer = await receive(listener, lambda message: "/tele/" in message.topic)
    # The first CPU load needs two samples, so the runtime may come a second time; the board's heat may not.
    assert {message.leaf for message in between} <= {"runtime", "worker"}
    assert warmer.leaf == "thermal"
    assert warmer.event.telemetry.thermal.max_celsius == 51.0


async def test_a_change_of_engine_is_told_at_once_and_only_then(broker: Broker, tmp_path: Path) -> None:
    with listening(broker, "edgellm/+/+/+/engines/state") as listener:
        async with publishing(settings_for(broker), tmp_path, device="engines") as publisher:
            await receive(listener, is_state(online=True))
            publisher.update_state(active_engine=ENGINE)
            changed = await receive(listener, is_state(online=True))
            publisher.update_state(active_engine=ENGINE)
        gone = await receive(listener, lambda _: True)
    assert changed.event.state.active_engine == ENGINE
    # Nothing came between: the same engine told twice is no change.
    assert (gone.event.state.online, gone.event.state.active_engine) == (False, "")


async def test_what_happens_is_told_on_the_topic_of_its_kind_with_ids_that_count(
    broker: Broker, tmp_path: Path
) -> None:
    happenings = [
        fleet_pb2.GovernorChanged(before="NOMINAL"),
        fleet_pb2.EngineChanged(what="ACTIVATED", engine=ENGINE),
        worker_ended(1),
        worker_ended(2),
    ]
    with listening(broker, f"{PREFIX}/evt/+") as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            events = Events()
            events.listen(publisher.happened)
            for happening in happenings:
                events.tell(happening)
            heard = [await receive(listener, lambda _: True) for _ in happenings]
            await until(lambda: publisher.part().queued_events == 0)
    assert [(message.leaf, message.event.id, message.qos) for message in heard] == [
        ("throttle", "1-governor-1", 1),
        ("deploy", "1-engine-1", 1),
        ("worker", "1-worker-1", 1),
        ("worker", "1-worker-2", 1),
    ]
    assert heard[0].event.governor == happenings[0]
    assert heard[1].event.engine == happenings[1]
    assert heard[3].event.worker == happenings[3]
    assert heard[3].event.type == "edgellm.worker.v1"


async def test_each_start_of_the_agent_is_a_run_of_its_own(broker: Broker, tmp_path: Path) -> None:
    ids = []
    with listening(broker, f"{PREFIX}/evt/worker") as listener:
        for _ in range(2):
            async with publishing(settings_for(broker), tmp_path) as publisher:
                publisher.happened(worker_ended(1))
                ids.append((await receive(listener, is_leaf("worker"))).event.id)
    assert ids == ["1-worker-1", "2-worker-1"]


async def test_a_killed_agent_leaves_a_retained_will_of_its_session(broker: Broker, tmp_path: Path) -> None:
    topic = f"{PREFIX}/state"
    with listening(broker, topic) as listener:
        for session in (1, 2):
            async with agent_process(settings_for(broker), tmp_path) as agent:
                born = await receive(
                    listener, lambda message: message.event.state.active_engine == ENGINE, deadline_s=30
                )
                agent.kill()
            will = await receive(listener, is_state(online=False))
            assert (born.event.state.session, will.event.state.session) == (session, session)
            assert will.event.state.agent_version == "0.1.0"
            assert not will.event.HasField("time")
            assert will.qos == 1
            kept = await asyncio.to_thread(retained, broker, topic)
            assert (kept.retain, kept.payload) == (True, will.payload)
            assert kept.content_type == born.content_type


async def test_messages_to_the_device_arrive_with_what_came_with_them(broker: Broker, tmp_path: Path) -> None:
    heard: list[tuple[str, bytes, MessageProperties]] = []
    with listening(broker) as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            # One before the connection, one after: both are subscribed.
            publisher.on_message(f"{PREFIX}/cmd/req", lambda *message: heard.append(message))
            await receive(listener, is_state(online=True))
            publisher.on_message(f"{PREFIX}/desired", lambda *message: heard.append(message))
            with _controller(broker) as send:
                await asyncio.to_thread(send, f"{PREFIX}/desired", b"wanted", retain=True)
                await until(lambda: bool(heard))
                await asyncio.to_thread(send, f"{PREFIX}/cmd/req", b"do it")
                # amqtt may deliver twice.
                await until(lambda: heard[-1][0] == f"{PREFIX}/cmd/req")
    five = "5" in broker.protocols
    assert heard[0][:2] == (f"{PREFIX}/desired", b"wanted")
    answer_to = MessageProperties(False, "text/plain", "answers", b"7") if five else MessageProperties(False)
    assert heard[-1] == (f"{PREFIX}/cmd/req", b"do it", answer_to)


async def test_a_retained_wish_is_found_by_a_device_that_comes_later(broker: Broker, tmp_path: Path) -> None:
    heard: list[tuple[bytes, bool]] = []
    with _controller(broker) as send:
        send("edgellm/v1/default/default/late/desired", b"generation 2", retain=True)
    async with publishing(settings_for(broker), tmp_path, device="late") as publisher:
        publisher.on_message(
            publisher.topics.desired, lambda _, payload, p: heard.append((payload, p.retain))
        )
        await until(lambda: bool(heard))
    # amqtt delivers it twice.
    assert set(heard) == {(b"generation 2", True)}


async def test_an_answer_carries_the_correlation_of_its_question(broker: Broker, tmp_path: Path) -> None:
    if "5" not in broker.protocols:
        pytest.skip("MQTT 3.1.1 has no correlation data")
    with listening(broker, f"{PREFIX}/cmd/resp") as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            event = publisher.new_event("command_result")
            event.command_result.name = "report"
            publisher.publish_event(publisher.topics.command_response, event, correlation_data=b"7")
            answer = await receive(listener, is_leaf("resp"))
    assert (answer.event.id, answer.correlation_data) == ("1-command_result-1", b"7")


async def test_a_message_that_is_too_long_is_dropped_and_told(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[bytes] = []
    with listening(broker, f"{PREFIX}/state") as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            publisher.on_message(f"{PREFIX}/cmd/req", lambda _, payload, __: heard.append(payload))
            # The birth comes after the subscriptions, so whoever hears it knows that they stand.
            await receive(listener, is_state(online=True))
            with _controller(broker) as send:
                for payload in (b"x" * (MAX_PAYLOAD_BYTES + 1), b"short"):
                    await asyncio.to_thread(send, f"{PREFIX}/cmd/req", payload)
                # amqtt changes the order, and may deliver twice.
                await until(
                    lambda: bool(heard) and any("message_too_long" in r.getMessage() for r in caplog.records)
                )
            with pytest.raises(ValueError, match=f"more than {MAX_PAYLOAD_BYTES}"):
                publisher.publish_event("edgellm/x", fleet_pb2.Event(source="x" * MAX_PAYLOAD_BYTES))
    assert set(heard) == {b"short"}


async def test_a_callback_that_fails_takes_no_other_message_along(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[bytes] = []

    def fail_once(_topic: str, payload: bytes, _properties: MessageProperties) -> None:
        heard.append(payload)
        if len(heard) == 1:
            raise RuntimeError("a mistake")

    with listening(broker, f"{PREFIX}/state") as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            publisher.on_message(f"{PREFIX}/cmd/req", fail_once)
            await receive(listener, is_state(online=True))
            with _controller(broker) as send:
                for payload in (b"one", b"two"):
                    await asyncio.to_thread(send, f"{PREFIX}/cmd/req", payload)
                await until(lambda: set(heard) == {b"one", b"two"})  # amqtt may deliver twice
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        f"mqtt.message_failed topic={PREFIX}/cmd/req"
    ]


async def test_a_device_without_power_sensors_sends_no_power(broker: Broker, tmp_path: Path) -> None:
    sampler = Sampler(SysfsSource(boards.build(tmp_path, boards.ORIN_NANO)), interval_s=0.1)
    sampler._reader._probes = [probe for probe in sampler._reader._probes if probe.part != "power"]
    publisher = MqttPublisher(
        settings_for(broker), sampler, device="laptop", state_dir=tmp_path, agent_version="0.1.0"
    )
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
            _publisher(settings, tmp_path)


def _publisher(settings: MqttSettings, state_dir: Path) -> MqttPublisher:
    sampler = Sampler(SysfsSource(state_dir))
    return MqttPublisher(settings, sampler, device="jetson-01", state_dir=state_dir, agent_version="0.1.0")


@contextmanager
def _controller(broker: Broker) -> Iterator[Callable[..., None]]:
    """A function that sends with QoS 1 and returns once the broker has it.

    amqtt loses what it has acknowledged if the sender goes before it was passed on: stay until it was heard.
    """
    five = "5" in broker.protocols
    client = paho.Client(
        paho.CallbackAPIVersion.VERSION2,
        client_id="controller",
        protocol=paho.MQTTv5 if five else paho.MQTTv311,
    )
    properties = None
    if five:
        properties = Properties(PacketTypes.PUBLISH)
        properties.ContentType = "text/plain"
        properties.ResponseTopic = "answers"
        properties.CorrelationData = b"7"
    client.connect(broker.host, broker.port)
    client.loop_start()

    def send(topic: str, payload: bytes, *, retain: bool = False) -> None:
        client.publish(topic, payload, 1, retain, properties).wait_for_publish(10)

    try:
        yield send
    finally:
        client.disconnect()
        client.loop_stop()
