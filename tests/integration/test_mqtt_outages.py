"""Brokers that are absent, slow or forgetful, disks that are full, clocks that jump."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.telemetry.sysfs import SysfsSource
from tests.support import boards
from tests.support.broker import Broker, find_mosquitto, listening, running_broker
from tests.support.publishing import (
    ENGINE,
    PREFIX,
    Receiver,
    is_leaf,
    is_live,
    is_state,
    publishing,
    receive,
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


async def test_an_absent_broker_is_no_error_and_finds_what_it_missed_when_it_comes(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker.stop()
    async with publishing(settings_for(broker), tmp_path) as publisher:
        publisher.update_state(active_engine=ENGINE)
        publisher.happened(worker_ended(1))
        await until(lambda: publisher.part().queued_events == 1 and publisher.part().queued_telemetry > 9)
        assert not publisher.part().connected
        broker.start()
        with listening(broker) as listener:
            born = await receive(listener, is_state(online=True))
            told = await receive(listener, is_leaf("worker"))
            first = await receive(listener, is_leaf("thermal"))
            await until(lambda: publisher.part().queued_bytes == 0)
    # The engine told during the outage is in the birth, and refused dials used up no number.
    assert (born.event.state.session, born.event.state.active_engine) == (1, ENGINE)
    assert (told.event.id, first.event.sequence) == ("1-worker-1", 1)
    # An outage is one line, not one per dial.
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    refused = f"mqtt.unreachable host=127.0.0.1 port={broker.port} reason=[Errno 111] Connection refused"
    assert warnings == [refused]


async def test_telemetry_of_an_outage_outlives_a_clean_stop_and_is_sent_in_order(
    broker: Broker, tmp_path: Path
) -> None:
    broker.stop()
    async with publishing(settings_for(broker), tmp_path) as publisher:
        await until(lambda: publisher.part().queued_telemetry >= 15)
    broker.start()
    receiver = Receiver()
    with listening(broker, f"{PREFIX}/tele/thermal") as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            await receiver.collect(listener, 5)
            await until(lambda: publisher.part().queued_telemetry == 0)
            receiver.take(listener.drain())
    old = [int(event_id.rsplit("-", 1)[1]) for event_id in receiver.ids if event_id.startswith("1-")]
    assert len(old) >= 4
    assert old == sorted(set(old))


async def test_offline_records_are_thinned_out(broker: Broker, tmp_path: Path) -> None:
    broker.stop()
    async with publishing(settings_for(broker, offline_interval_s=3600), tmp_path) as publisher:
        async for record in publisher._sampler.records():
            if record.sequence > 10:
                break
        # The first record and its topics; the next one would be due in an hour.
        assert publisher.part().queued_telemetry == 3


async def test_a_clock_that_jumps_by_a_day_changes_no_id_and_no_order(broker: Broker, tmp_path: Path) -> None:
    offset_ns = [0]
    clock = Clock(wall_ns=lambda: time.time_ns() + offset_ns[0])
    with listening(broker, f"{PREFIX}/evt/worker") as listener:
        async with publishing(settings_for(broker), tmp_path, clock=clock) as publisher:
            heard = []
            for number, days in enumerate((0, -1, 1, 0)):
                offset_ns[0] = days * 86_400 * 10**9
                publisher.happened(worker_ended(number))
                heard.append(await receive(listener, lambda _: True))
    assert [message.event.id for message in heard] == [f"1-worker-{number}" for number in range(1, 5)]
    assert [message.event.sequence for message in heard] == [1, 2, 3, 4]
    times = [message.event.time.ToSeconds() for message in heard]
    assert times[1] < times[0] - 80_000 < times[0] + 80_000 < times[2]


async def test_a_retained_value_given_while_away_is_told_at_the_connection_and_only_the_last(
    broker: Broker, tmp_path: Path
) -> None:
    broker.stop()
    async with publishing(settings_for(broker), tmp_path) as publisher:
        for phase in ("FETCHING", "CONVERGED"):
            event = publisher.new_event("reported")
            event.reported.phase = phase
            publisher.publish_retained(publisher.topics.reported, event)
        broker.start()
        with listening(broker, f"{PREFIX}/reported") as listener:
            first = await receive(listener, lambda _: True)
            # Forgotten by a broker that keeps nothing, and told again.
            broker.kill()
            await until(lambda: not publisher.connected)
            broker.start()
            second = await receive(listener, lambda _: True)
    assert first.event.reported.phase == "CONVERGED"
    assert (first.event.id, second.event.id) == ("1-reported-2", "1-reported-2")


async def test_commands_sent_while_the_device_was_away_arrive_within_the_session_expiry(
    broker: Broker, tmp_path: Path
) -> None:
    heard: list[bytes] = []
    for session in (1, 2):
        async with publishing(settings_for(broker), tmp_path) as publisher:
            publisher.on_message(
                publisher.topics.command_request, lambda _, payload, __: heard.append(payload)
            )
            await until(lambda publisher=publisher: publisher.connected)
            if session == 2:
                await until(lambda: bool(heard))
            else:
                # Subscribed for certain once a message came back.
                await asyncio.to_thread(_command, broker, b"first")
                await until(lambda: bool(heard))
                heard.clear()
        if session == 1:
            await asyncio.to_thread(_command, broker, b"while away")
    assert heard == [b"while away"]


def _command(broker: Broker, payload: bytes) -> None:
    from paho.mqtt import publish

    publish.single(f"{PREFIX}/cmd/req", payload, qos=1, hostname=broker.host, port=broker.port)


async def test_a_broker_that_stops_reading_does_not_fill_memory_or_stop_sampling(tmp_path: Path) -> None:
    """A listener that accepts, says yes to MQTT 3.1.1 and then never reads again."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = MqttSettings(
            host="127.0.0.1",
            port=listener.getsockname()[1],
            protocol="3.1.1",
            interval_s=0.1,
            max_silence_s=0,
        )
        sampler = Sampler(SysfsSource(boards.build(tmp_path / "root", boards.ORIN_NANO)), interval_s=0.01)
        publisher = MqttPublisher(
            settings, sampler, device="stalled", state_dir=tmp_path, agent_version="0.1.0"
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
            assert publisher.connected
            # A window of live telemetry and no more; then one record in ten seconds is kept.
            assert len(publisher._live) <= 9
            assert publisher.part().queued_telemetry <= 6
            assert len(publisher._connection._client._out_messages) <= 20
            await asyncio.wait_for(publisher.close(deadline_s=0.5), 4)
        await sampler.close()


async def test_a_full_disk_drops_telemetry_and_sends_events_from_memory(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(broker, f"{PREFIX}/evt/worker") as listener:
        async with publishing(settings_for(broker), tmp_path) as publisher:
            await until(lambda: publisher.connected)
            publisher.happened(worker_ended(0))
            await receive(listener, is_leaf("worker"))
            database = publisher._backlog._outbox._db
            assert database is not None
            # SQLite's own way to make a disk full. Free pages are used up first.
            database.execute("PRAGMA max_page_count = 1")
            heard = set()
            for number in range(1, 100):
                publisher.happened(worker_ended(number))
            while len(heard) < 99:
                heard.add((await receive(listener, is_leaf("worker"))).event.worker.restarts_total)
            database.execute("PRAGMA max_page_count = 100000")
            publisher.happened(worker_ended(100))
            await receive(listener, lambda message: message.event.worker.restarts_total == 100)
            await until(lambda: publisher.part().queued_events == 0)
    assert heard == set(range(1, 100))
    messages = [
        record.getMessage().split()[0] for record in caplog.records if record.name.endswith("backlog")
    ]
    assert messages == ["mqtt.outbox_fails", "mqtt.outbox_works_again"]


async def test_live_telemetry_goes_on_while_the_backlog_drains(broker: Broker, tmp_path: Path) -> None:
    broker.stop()
    async with publishing(settings_for(broker), tmp_path) as publisher:
        await until(lambda: publisher.part().queued_telemetry >= 30)
    broker.start()
    with listening(broker, f"{PREFIX}/tele/thermal") as listener:
        # Thirty messages would take half a minute.
        async with publishing(settings_for(broker, catch_up_messages_per_s=1), tmp_path) as publisher:
            await until(lambda: publisher.connected)
            live = await receive(listener, is_live(publisher, "thermal"))
            assert publisher.part().queued_telemetry > 20
    assert live.event.run == 2
