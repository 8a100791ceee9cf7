"""Desired state and commands through a real mosquitto: what is retained reaches a device that was away."""

import asyncio
from contextlib import asynccontextmanager

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgellm.fleet.topics import encode
from edgellm.v1 import fleet_pb2
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.desired.commands import Commands
from edgellm_agent.desired.controller import DesiredController
from edgellm_agent.desired.settings import CommandSettings, DesiredSettings
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.registry import Registry
from edgellm_agent.telemetry.host import HostSource
from edgellm_agent.telemetry.sampler import Sampler
from tests.support.broker import find_mosquitto, listening, running_broker
from tests.support.desired_device import NOW_NS, TOPICS, make_layout, make_manager
from tests.support.publishing import is_state, settings_for
from tests.support.range_server import range_server


@asynccontextmanager
async def linked(broker, state_dir):
    """A real uplink, without telemetry."""
    sampler = Sampler(HostSource(), interval_s=3600)
    publisher = MqttPublisher(
        settings_for(broker, tenant=TOPICS.tenant, group=TOPICS.group),
        sampler,
        device=TOPICS.device,
        state_dir=state_dir,
        agent_version="0.1.0",
    )
    publisher.start()
    yield publisher
    await publisher.close()


@pytest.fixture
def broker():
    if find_mosquitto() is None:
        pytest.skip("needs mosquitto (apt-get install mosquitto)")
    with running_broker("mosquitto") as running:
        yield running


def send(broker, topic, event, *, retain):
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.publish(topic, encode(event, "json"), qos=1, retain=retain).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


async def test_a_device_that_was_away_converges_when_it_returns(broker, tmp_path):
    _, digest = make_layout(tmp_path / "engine")
    with range_server(tmp_path) as server, listening(broker, TOPICS.reported) as listener:
        wish = fleet_pb2.Event(id="f-1")
        wish.desired.CopyFrom(fleet_pb2.Desired(generation=4, engine=digest, source=f"{server.url}/engine"))
        await asyncio.to_thread(send, broker, TOPICS.desired, wish, retain=True)
        async with linked(broker, tmp_path / "link") as uplink:
            manager = make_manager(tmp_path / "state")
            controller = DesiredController(
                DesiredSettings(sources=[server.url]), manager, uplink, Fleet("operator")
            )
            manager.settle()
            await manager.start()
            controller.start()
            told = await asyncio.to_thread(
                listener.wait_for, lambda message: message.event.reported.phase == "CONVERGED"
            )
            assert told.event.reported.active_engine == digest
            await controller.close()
        await manager.close()
    with listening(broker, TOPICS.reported) as late:
        kept = await asyncio.to_thread(late.wait_for, lambda _: True)
    assert kept.retain
    assert kept.event.reported.observed_generation == 4


async def test_a_command_is_answered_on_the_devices_own_topic_only(broker, tmp_path):
    async def report():
        return "told"

    order = fleet_pb2.Event(id="c-1")
    order.command.name = "report"
    order.command.expires.FromNanoseconds(NOW_NS + 60 * 10**9)
    with listening(broker) as listener:
        async with linked(broker, tmp_path) as uplink:
            settings = CommandSettings(allow=["report"])
            commands = Commands(
                settings, {"report": report}, uplink, Fleet("operator"), wall_ns=lambda: NOW_NS
            )
            commands.start()
            await asyncio.to_thread(listener.wait_for, is_state(online=True))
            await asyncio.to_thread(send, broker, TOPICS.command_request, order, retain=False)
            answer = await asyncio.to_thread(
                listener.wait_for, lambda message: message.topic not in {TOPICS.command_request, TOPICS.state}
            )
            await commands.close()
    assert answer.topic == TOPICS.command_response
    assert (answer.event.command_result.command_id, answer.event.command_result.output) == ("c-1", "told")


def test_a_pin_over_the_devices_api_survives_the_agent(serving):
    with serving.client() as client:
        assert client.pin() == client.info().active_engine
    serving.stop()
    registry = Registry(serving.state / "registry.db")
    assert registry.pinned()
    registry.close()
