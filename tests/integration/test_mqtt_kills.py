"""Brokers and agents that are killed: no event is lost, none is counted twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.fleet.topics import decode
from edgellm_agent.mqtt.base import Publication
from edgellm_agent.mqtt.outbox import Outbox
from edgellm_agent.mqtt.publisher import MqttPublisher
from tests.support.broker import Broker, Received, find_mosquitto, listening, running_broker
from tests.support.publishing import (
    ENGINE,
    PREFIX,
    Receiver,
    agent_process,
    publishing,
    receive,
    retained,
    settings_for,
    until,
    worker_ended,
)

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture
def broker() -> Iterator[Broker]:
    """One of its own for each test: it is stopped and killed."""
    with running_broker("mosquitto") as running:
        yield running


@pytest.fixture
def persistent(tmp_path: Path) -> Iterator[Broker]:
    folder = tmp_path / "mosquitto"
    folder.mkdir()
    options = (
        "allow_anonymous true\npersistence true\n"
        f"persistence_location {folder}/\nautosave_on_changes true\nautosave_interval 1"
    )
    with running_broker("mosquitto", options) as running:
        yield running


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_killed_broker_with_persistence_costs_no_event(
    persistent: Broker, tmp_path: Path, protocol: str
) -> None:
    receiver = Receiver()
    async with publishing(settings_for(persistent, protocol=protocol), tmp_path) as publisher:
        with listening(persistent, f"{PREFIX}/evt/#", durable="fleet") as listener:
            await _tell(publisher, 0, 50)
            await receiver.collect(listener, 50)
            persistent.kill()
            await until(lambda: not publisher.connected)
            await _tell(publisher, 50, 100)
            assert publisher.part().queued_events >= 50
            persistent.start()
            await receiver.collect(listener, 100)
            await until(lambda: publisher.part().queued_events == 0)
    assert list(receiver.seen) == [f"1-worker-{number}" for number in range(1, 101)]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_killed_broker_without_persistence_costs_no_event_that_its_receiver_was_back_for(
    broker: Broker, tmp_path: Path, protocol: str
) -> None:
    receiver = Receiver()
    async with publishing(settings_for(broker, protocol=protocol), tmp_path) as publisher:
        gate = _hold_dials(publisher)
        with listening(broker, f"{PREFIX}/evt/#") as listener:
            await _tell(publisher, 0, 50)
            await receiver.collect(listener, 50)
        gate.clear()
        broker.kill()
        await until(lambda: not publisher.connected)
        await _tell(publisher, 50, 100)
        publisher.update_state(active_engine=ENGINE)
        broker.start()
        with listening(broker, f"{PREFIX}/evt/#") as listener:
            gate.set()
            await receiver.collect(listener, 100)
        await until(lambda: publisher.part().queued_events == 0)
        kept = await asyncio.to_thread(retained, broker, f"{PREFIX}/state")
    assert list(receiver.seen) == [f"1-worker-{number}" for number in range(1, 101)]
    # The state is there again, and none of the session before has come over it.
    assert (kept.event.state.session, kept.event.state.active_engine) == (2, ENGINE)


async def test_a_broker_that_is_killed_while_events_flow_gets_again_what_it_had_not_acknowledged(
    broker: Broker, tmp_path: Path
) -> None:
    """What it had acknowledged and not delivered dies with it: no client can know of that."""
    receiver = Receiver()
    async with publishing(settings_for(broker), tmp_path) as publisher:
        gate = _hold_dials(publisher)
        for end in (200, 400, 600):
            with listening(broker, f"{PREFIX}/evt/worker") as listener:
                gate.set()
                await until(lambda: publisher.connected)
                telling = asyncio.create_task(_tell(publisher, end - 200, end - 20))
                await receive(listener, lambda message, end=end: message.event.sequence > end - 100)
                gate.clear()
                broker.kill()
                await telling
                await _tell(publisher, end - 20, end)
                await until(lambda: not publisher.connected)
            waiting = _waiting_events(publisher)
            assert len(waiting) >= 20
            broker.start()
            with listening(broker, f"{PREFIX}/evt/worker") as listener:
                gate.set()
                await until(lambda: publisher.part().queued_events == 0)
                await receive(
                    listener, lambda message, end=end: _keep(receiver, message).event.sequence == end
                )
            assert waiting <= receiver.seen.keys()
    assert receiver.seen["1-worker-600"].event.worker == worker_ended(599)


def _keep(receiver: Receiver, message: Received) -> Received:
    receiver.take([message])
    return message


def _waiting_events(publisher: MqttPublisher) -> set[str]:
    stored = publisher._backlog._outbox.oldest(events=True, limit=1000)
    gone = publisher._backlog._gone
    return {decode(entry.message.payload).id for entry in stored if entry.key not in gone}


async def _tell(publisher: MqttPublisher, first: int, end: int) -> None:
    """Tell events, and wait until they are on disk."""
    for number in range(first, end):
        publisher.happened(worker_ended(number))
    await until(lambda: not publisher._backlog._events)


def _hold_dials(publisher: MqttPublisher) -> threading.Event:
    """Let the device dial only while this is set: what a broker takes and forgets, nobody can know of."""
    gate, will = threading.Event(), publisher._connection._will
    gate.set()

    def held(session: int) -> Publication:
        gate.wait(30)
        return will(session)

    publisher._connection._will = held  # type: ignore[method-assign]
    return gate


async def test_an_agent_that_is_killed_with_a_full_outbox_sends_everything_at_its_next_start(
    broker: Broker, tmp_path: Path
) -> None:
    receiver = Receiver()
    settings = settings_for(broker)
    broker.stop()
    async with agent_process(settings, tmp_path, events=500) as agent:
        assert agent.stdout is not None
        assert await asyncio.wait_for(agent.stdout.readline(), 30) == b"told\n"
        agent.kill()
    outbox = Outbox(tmp_path / "outbox.db", settings.outbox_bytes)
    outbox.open()
    assert outbox.waiting.events == 500
    outbox.close()
    broker.start()
    with listening(broker, f"{PREFIX}/evt/worker") as listener:
        # Killed once more in the middle of sending, and again.
        for least in (100, 250):
            async with agent_process(settings_for(broker), tmp_path) as agent:
                await receiver.collect(listener, least)
                agent.kill()
        async with publishing(settings, tmp_path) as publisher:
            await receiver.collect(listener, 500)
            await until(lambda: publisher.part().queued_events == 0)
    assert set(receiver.seen) == {f"1-worker-{number}" for number in range(1, 501)}
    numbers = {event.event.worker.restarts_total for event in receiver.seen.values()}
    assert numbers == set(range(500))
    # Sent again was at most what was on its way or not deleted yet; the first of each came in order.
    assert list(receiver.seen) == [f"1-worker-{number}" for number in range(1, 501)]
