"""The whole agent where all around it goes wrong: brokers, servers, clocks, heat, and whoever kills it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgellm.bundle import Bundle
from edgellm.client import Client
from edgellm.errors import RemoteError
from edgellm.fleet.queries import DeviceView, FleetReader
from edgellm.fleet.receiver import Receiver
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.topics import DeviceTopics, decode, encode
from edgellm.v1 import fleet_pb2
from edgellm_agent import daemon
from edgellm_agent.config import AgentSettings
from edgellm_agent.desired.commands import Commands
from edgellm_agent.telemetry import recording
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.recording import Content, Snapshot
from edgellm_agent.telemetry.replay import load_recording
from tests.conftest import push
from tests.support.agents import Agent, running_agent, wait_for
from tests.support.broker import Broker, find_mosquitto, listening, running_broker
from tests.support.publishing import receive, until
from tests.support.range_server import Answer, range_server

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

TOPICS = DeviceTopics("default", "default", "jetson-test")
DAY_S = 86_400
# What an agent may take to end beyond the time that its running requests get.
END_S = 16.0


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running_broker("mosquitto") as running:
        yield running


def mqtt(host: str, port: int) -> str:
    return f'[mqtt]\nhost = "{host}"\nport = {port}\n'


def publish(broker: Broker, topic: str, event: fleet_pb2.Event, *, retain: bool) -> None:
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.publish(topic, encode(event, "json"), qos=1, retain=retain).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


def desired(bundle: Bundle, source: str) -> fleet_pb2.Event:
    event = fleet_pb2.Event(id="d-1", source="edgellm/default/fleet", type="edgellm.desired.v1")
    event.desired.CopyFrom(fleet_pb2.Desired(generation=1, engine=bundle.variants[0].digest, source=source))
    return event


# Killed.


def waiting_events(agent: Agent) -> list[str]:
    """Ids of the events that are on the agent's disk, oldest first."""
    file = agent.state / "outbox.db"
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT payload FROM messages WHERE is_event ORDER BY id").fetchall()
    return [decode(payload).id for (payload,) in rows]


def test_an_agent_that_is_killed_while_its_broker_is_away_tells_everything_once_when_both_are_back(
    broker: Broker, short_dir: Path, tiny: Bundle
):
    broker.stop()
    with running_agent(short_dir, mqtt(broker.host, broker.port)) as agent:
        push(agent, tiny)
        with agent.client() as client:
            for number in range(100):
                client.pin(number % 2 == 0)
        # PUSHED, ACTIVATED and COMMITTED came first.
        kept = wait_for(lambda: len(ids := waiting_events(agent)) == 103 and ids, "the events on disk")
        agent.stop(signal.SIGKILL)
        broker.start()
        with listening(broker, f"{TOPICS.base}/evt/#") as listener:
            agent.start()
            heard = [listener.wait_for(lambda _: True).event.id for _ in kept]
            assert heard == kept
            with agent.client() as client:
                client.pin()
            # Nothing of before comes between, or again.
            assert listener.wait_for(lambda _: True).event.engine.what == "PINNED"
            wait_for(lambda: not waiting_events(agent), "an empty outbox")


# Told to end.


@contextlib.contextmanager
def mute_broker() -> Iterator[int]:
    """A port where somebody accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def watched(agent: Agent) -> Iterator[list[str]]:
    """Somebody follows the agent's log and somebody its telemetry; gives what ended."""
    ended: list[str] = []
    began = threading.Barrier(3)

    def follow(name: str, watch: Callable[[Client], Iterator[object]]) -> None:
        with agent.client() as client, contextlib.suppress(RemoteError):
            stream = watch(client)
            next(stream)
            began.wait(20)
            for _ in stream:
                pass
        ended.append(name)

    followers = [
        threading.Thread(target=follow, args=("log", lambda client: client.watch_logs(follow=True))),
        threading.Thread(target=follow, args=("telemetry", lambda client: client.watch_telemetry())),
    ]
    for follower in followers:
        follower.start()
    began.wait(20)
    yield ended
    for follower in followers:
        follower.join(20)


def test_an_agent_without_a_broker_ends_in_time_also_while_it_is_watched(short_dir: Path, broker: Broker):
    broker.stop()
    with running_agent(short_dir, "drain_s = 100\n" + mqtt(broker.host, broker.port)) as agent:
        with watched(agent) as ended:
            assert agent.stop(timeout_s=END_S) == 0
        assert sorted(ended) == ["log", "telemetry"]


def test_an_agent_whose_broker_never_answers_ends_in_time(short_dir: Path):
    with mute_broker() as port, running_agent(short_dir, mqtt("127.0.0.1", port)) as agent:
        assert agent.stop(timeout_s=END_S) == 0


def test_an_agent_ends_in_time_while_a_fetch_stands_still_and_goes_on_with_it_at_its_next_start(
    short_dir: Path, broker: Broker, tiny: Bundle
):
    with range_server(tiny.path.parent) as server:
        largest = max(tiny.manifest(tiny.variants[0].digest).layers, key=lambda layer: layer.size_bytes)

        def stall(_asked: object, answer: Answer) -> Answer:
            return replace(answer, stall_after=len(answer.body) // 2)

        server.always = lambda asked, answer: (
            stall(asked, answer) if asked.path.endswith(largest.digest.removeprefix("sha256:")) else answer
        )
        settings = f'[desired]\nsources = ["{server.url}/"]\n' + mqtt(broker.host, broker.port)
        source = f"{server.url}/{tiny.path.name}"
        publish(broker, TOPICS.desired, desired(tiny, source), retain=True)
        with running_agent(short_dir, settings) as agent:
            assert server.stalled.wait(20)
            assert agent.stop(timeout_s=END_S) == 0
            server.always = None
            with listening(broker, TOPICS.reported) as listener:
                agent.start()
                listener.wait_for(lambda message: message.event.reported.phase == "CONVERGED", 30)


# With a wrong clock.


async def test_a_device_whose_clock_is_a_day_behind_converges_and_is_recorded_with_its_skew(
    broker: Broker, short_dir: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
):
    def behind_ns() -> int:
        return time.time_ns() - DAY_S * 10**9

    for module in ("edgellm_agent.mqtt.publisher", "edgellm_agent.telemetry.sampler"):
        monkeypatch.setattr(f"{module}.Clock", lambda: Clock(wall_ns=behind_ns))
    monkeypatch.setattr(daemon, "Commands", functools.partial(Commands, wall_ns=behind_ns))
    order = fleet_pb2.Event(id="c-1")
    order.command.name = "report"
    order.command.expires.FromNanoseconds(time.time_ns() + 60 * 10**9)
    receiver = Receiver(BrokerSettings(broker=f"mqtt://{broker.host}:{broker.port}"), short_dir / "fleet.db")
    receiver.start()
    await asyncio.to_thread(receiver.wait_ready, 20)
    with range_server(tiny.path.parent) as server, listening(broker, TOPICS.command_response) as answers:
        wish = desired(tiny, f"{server.url}/{tiny.path.name}")
        await asyncio.to_thread(publish, broker, TOPICS.desired, wish, retain=True)
        settings = AgentSettings(
            device=TOPICS.device,
            profile="orin-nano-8gb",
            simulate=True,
            threads=1,
            telemetry_interval_s=0.1,
            drain_s=1,
            state_dir=short_dir / "state",
            socket=short_dir / "a.sock",
            mqtt={"host": broker.host, "port": broker.port},
            desired={"sources": [f"{server.url}/"]},
            lifecycle={"probation_s": 0},
            commands={"allow": ["report"]},
        )
        with FleetReader(short_dir / "fleet.db") as reader:
            async with daemon.running(settings):
                view = await seen(reader, lambda view: phase(view) == "CONVERGED" and view.telemetry_ns > 0)
                await until(lambda: recorded_changes(reader) == ["FETCHED", "ACTIVATED", "COMMITTED"])
                await asyncio.to_thread(publish, broker, TOPICS.command_request, order, retain=False)
                answer = await receive(answers, lambda _: True)
            await asyncio.to_thread(receiver.close)
            assert reader.counters().get("rejected", 0) == 0
    assert view.skew_s == pytest.approx(DAY_S, abs=60)
    assert view.reported is not None
    assert view.reported.active_engine == tiny.variants[0].digest
    # By its clock the order is for tomorrow.
    assert "by this device's clock: " in answer.event.command_result.error


def phase(view: DeviceView) -> str:
    return view.reported.phase if view.reported is not None else ""


def recorded_changes(reader: FleetReader) -> list[str]:
    """What happened to engines, as it is recorded."""
    events = (event for _, event in reader.events(TOPICS, 0, 100))
    return [event.engine.what for event in events if event.HasField("engine")]


async def seen(reader: FleetReader, wanted: Callable[[DeviceView], bool]) -> DeviceView:
    """The device as it is recorded, once it is as wanted."""
    found: list[DeviceView] = []

    def look() -> bool:
        found[:] = [view for view in reader.devices() if wanted(view)]
        return bool(found)

    await until(look, 30)
    return found[0]


# Too hot.


def hot_for_a_while(file: Path) -> Path:
    """The recording of a board that is close to its trip point of 99 °C from second 2 to 6, else cool."""
    shipped = load_recording("heat-up")
    first = dict(shipped.snapshots[0].files)
    zones = [path for path, text in first.items() if path.endswith("/temp") and isinstance(text, str)]

    def at(celsius: float) -> dict[str, Content]:
        return dict.fromkeys(zones, f"{round(celsius * 1000)}\n")

    snapshots = [Snapshot(t_s=0, files=first | at(60)), Snapshot(t_s=2, files=at(98.5))]
    snapshots.append(Snapshot(t_s=6, files=at(60)))
    file.write_bytes(b"".join(map(recording.encoded, [shipped.header, *snapshots])))
    return file


def test_a_device_near_its_trip_point_refuses_with_a_time_to_come_back_and_answers_when_it_has_cooled(
    short_dir: Path, tiny: Bundle
):
    with running_agent(short_dir) as agent:
        push(agent, tiny)
        agent.stop()
        agent.settings = f'telemetry_source = "replay:{hot_for_a_while(short_dir / "hot.jsonl")}"'
        agent.start()
        with agent.client() as client:

            def governed(state: str) -> bool:
                record = next(client.watch_telemetry(timeout_s=5))
                return record.governor.state == state and record.runtime.state == "serving"

            wait_for(lambda: governed("CRITICAL"), "a critical board")
            with pytest.raises(RemoteError, match="too hot") as refused:
                client.generate("Hello", max_tokens=4).read()
            assert refused.value.code == "UNAVAILABLE"
            assert 10 <= (refused.value.retry_after_s or 0) <= 120
            # Ten seconds after it was last needed.
            wait_for(lambda: governed("HOT"), "a board that has cooled", 30)
            answer = client.generate("Hello", max_tokens=4, ignore_eos=True).read()
        assert answer.completion_tokens == 4
