"""Devices of a fleet, simulated: real MQTT clients that say what an agent says, and misbehave on demand."""

from __future__ import annotations

import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edgellm.fleet.topics import (
    CONTENT_TYPES,
    EVENTS,
    DeviceTopics,
    Encoding,
    decode,
    encode,
    envelope,
    state_event,
    telemetry_events,
)
from edgellm.v1 import fleet_pb2, telemetry_pb2
from scripts.demo_broker import Broker

if TYPE_CHECKING:
    from typing_extensions import Self

ENGINE = "sha256:" + "a" * 64
NEXT_ENGINE = "sha256:" + "b" * 64
_READY_S = 15.0
_NO_MATCHING_SUBSCRIBERS = 16

Happening: TypeAlias = fleet_pb2.GovernorChanged | fleet_pb2.EngineChanged | fleet_pb2.WorkerEnded


@dataclass(frozen=True)
class Message:
    """What a device publishes."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False


def orin_nano_record(sequence: int, time_ns: int, monotonic_ns: int = 0) -> telemetry_pb2.Telemetry:
    """A record of an Orin Nano that generates, warmer and cooler by the minute, as the agent fills it."""
    swing = math.sin(sequence / 60)
    record = telemetry_pb2.Telemetry(sequence=sequence, monotonic_ns=monotonic_ns or sequence * 10**9)
    record.time.FromNanoseconds(time_ns)
    for name, offset in (("cpu-thermal", -3), ("gpu-thermal", -2), ("soc0-thermal", -4), ("tj-thermal", 0)):
        celsius = round(62 + 9 * swing + offset, 1)
        record.thermal.zones.add(name=name, celsius=celsius, passive_celsius=95, critical_celsius=105)
    record.thermal.max_celsius = round(62 + 9 * swing, 1)
    record.thermal.margin_celsius = round(33 - 9 * swing, 1)
    record.power.total_mw = round(9600 + 900 * swing)
    record.power.mode = "15W"
    for rail, power_mw in (("VDD_IN", 9600), ("VDD_CPU_GPU_CV", 4300), ("VDD_SOC", 2100)):
        record.power.rails.add(name=rail, voltage_mv=5000, current_ma=power_mw / 5, power_mw=power_mw)
    record.power.energy_total_j = round(9.6 * sequence, 1)
    record.compute.cpu_percent, record.compute.gpu_percent = 41.5, round(88 + 9 * swing, 1)
    record.compute.cpu_mhz, record.compute.gpu_mhz = 1510, 624
    record.memory.total_bytes, record.memory.available_bytes = 7_990_000_000, 3_100_000_000
    runtime = record.runtime
    runtime.state, runtime.engine = "serving", ENGINE
    runtime.decode_tokens_per_s, runtime.tokens_per_joule = (
        round(21.5 - swing, 2),
        round(2.24 - swing / 10, 3),
    )
    runtime.running_sequences, runtime.kv_bound_bytes = 2, 1_200_000_000
    runtime.requests_total, runtime.generated_tokens_total = sequence // 9, 21 * sequence
    record.governor.state, record.governor.pace, record.governor.max_sequences = "NOMINAL", 1.0, 4
    record.uplink.connected = True
    return record


class SimulatedDevice:
    """One device: birth, will, telemetry and events with the ids of an agent, and an answer to `desired`.

    What is published with QoS 1 while the broker is away waits in the client and is sent again, as from an
    agent's outbox; so is an event that no receiver was there for. Unless `threaded`,
    whoever owns the device drives `client`'s loop.
    """

    def __init__(
        self,
        broker: Broker,
        name: str = "jetson-01",
        *,
        group: str = "line-1",
        run: int = 1,
        session: int = 0,
        clock_ahead_s: float = 0.0,
        encoding: Encoding = "json",
        telemetry_qos: int = 1,
        threaded: bool = True,
    ) -> None:
        self.topics = DeviceTopics("default", group, name)
        self.run = run
        self.session = session
        self.active = ENGINE
        self.answer: Callable[[fleet_pb2.Desired], Sequence[fleet_pb2.Reported]] = self.obey
        self._broker, self._threaded = broker, threaded
        self._clock_ahead_ns = round(clock_ahead_s * 1e9)
        self._encoding, self._telemetry_qos = encoding, telemetry_qos
        self._counts: dict[str, int] = {}
        self._revision = self._observed = 0
        self._connected, self._closing = threading.Event(), threading.Event()
        # On their way, by number; and what was acknowledged before its number was known.
        self._outbox: dict[int, Message] = {}
        self._early: dict[int, int] = {}
        self._lock = threading.Lock()
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.topics.source.replace("/", "-"),
            protocol=MQTTProtocolVersion.MQTTv5,
        )
        self.client.max_inflight_messages_set(1000)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_pre_connect = lambda *_: self._set_will()
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = lambda *_: self._connected.clear()
        self.client.on_message = self._on_desired
        self.client.on_publish = self._on_publish

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.client.disconnect()
        if self._threaded:
            self.client.loop_stop()

    def connect(self) -> None:
        """Connects, and waits for it if the device has a thread of its own."""
        if self._threaded:
            self.client.connect_async(self._broker.host, self._broker.port, keepalive=20)
            self.client.loop_start()
            assert self._connected.wait(_READY_S), "the simulated device does not connect"
        else:
            self.client.connect(self._broker.host, self._broker.port, keepalive=20)

    def vanish(self) -> None:
        """As when the power fails: the socket closes without a word, and the broker publishes the will."""
        self._closing.set()
        self.client.loop_stop()
        sock = self.client.socket()
        assert sock is not None
        sock.close()

    def telemetry(self, count: int = 1) -> list[Message]:
        """The messages of the next records."""
        messages = []
        for _ in range(count):
            record = orin_nano_record(self._next("telemetry"), self._now_ns(), time.monotonic_ns())
            messages += [
                Message(self.topics.telemetry(name), encode(event, self._encoding), self._telemetry_qos)
                for name, event in telemetry_events(self.topics, self.run, record)
            ]
        return messages

    def event(
        self, happening: fleet_pb2.GovernorChanged | fleet_pb2.EngineChanged | fleet_pb2.WorkerEnded
    ) -> Message:
        """The message of something that happened."""
        name = type(happening).__name__
        kind = {"GovernorChanged": "governor", "EngineChanged": "engine", "WorkerEnded": "worker"}[name]
        assert kind in EVENTS
        event = envelope(self.topics, kind, self.run, self._next(kind), self._now_ns())
        getattr(event, kind).CopyFrom(happening)
        return Message(self.topics.event(kind), encode(event, self._encoding), 1)

    def events(self, count: int) -> list[Message]:
        """Messages of so many crashes of the engine's worker."""
        return [
            self.event(fleet_pb2.WorkerEnded(engine=ENGINE, reason="signal 9", out_of_memory=True))
            for _ in range(count)
        ]

    def send(self, messages: Message | Sequence[Message]) -> list[paho.MQTTMessageInfo]:
        """Publishes as they stand: twice for a duplicate, in another order to reorder."""
        messages = [messages] if isinstance(messages, Message) else messages
        return [self._publish(message) for message in messages]

    def state(self, *, online: bool = True) -> Message:
        """Birth or farewell of the present session."""
        self._revision += 1
        return self._state(self.session, online, self._revision, self._now_ns())

    def will(self, session: int) -> Message:
        """The will of some session, as the broker would publish it."""
        return self._state(session, False, 0, None)

    def reported(self, report: fleet_pb2.Reported) -> Message:
        """A report, retained."""
        event = envelope(self.topics, "reported", self.run, self._next("reported"), self._now_ns())
        event.reported.CopyFrom(report)
        return Message(self.topics.reported, encode(event, self._encoding), 1, retain=True)

    def obey(self, desired: fleet_pb2.Desired) -> list[fleet_pb2.Reported]:
        """Fetches and activates at once."""
        seen = fleet_pb2.Reported(
            observed_generation=desired.generation, desired_engine=desired.engine, active_engine=self.active
        )
        fetching = fleet_pb2.Reported(phase="FETCHING", fetched_bytes=40, total_bytes=100)
        fetching.MergeFrom(seen)
        self.active = desired.engine
        seen.active_engine, seen.phase = desired.engine, "CONVERGED"
        return [fetching, seen]

    def _state(self, session: int, online: bool, revision: int, time_ns: int | None) -> Message:
        state = fleet_pb2.DeviceState(
            online=online,
            session=session,
            agent_version="0.1.0",
            profile="orin-nano-8gb",
            active_engine=self.active if online else "",
        )
        event = state_event(self.topics, state, run=self.run, revision=revision, time_ns=time_ns)
        return Message(self.topics.state, encode(event, self._encoding), 1, retain=True)

    def _publish(self, message: Message) -> paho.MQTTMessageInfo:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = CONTENT_TYPES[self._encoding]
        info = self.client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        with self._lock:
            reason = self._early.pop(info.mid, None)
            if reason is None:
                self._outbox[info.mid] = message
        if reason is not None:
            self._published(message, reason)
        return info

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, reason: ReasonCode, _properties: object
    ) -> None:
        with self._lock:
            message = self._outbox.pop(mid, None)
            if message is None:
                # Before `publish` has said its number.
                self._early[mid] = reason.value
        if message is not None:
            self._published(message, reason.value)

    def _published(self, message: Message, reason: int) -> None:
        """Sends an event again that found no receiver.

        A broker that was restarted without a memory may take it before a receiver has subscribed again, and
        drops it; MQTT 5 says so.
        """
        if "/evt/" in message.topic and reason == _NO_MATCHING_SUBSCRIBERS and not self._closing.is_set():
            again = threading.Timer(0.2, self._publish, (message,))
            again.daemon = True
            again.start()

    def _set_will(self) -> None:
        self.session += 1
        will = self.will(self.session)
        self.client.will_set(will.topic, will.payload, will.qos, will.retain)

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        client.subscribe(self.topics.desired, qos=1)
        self.send(self.state())
        self._connected.set()

    def _on_desired(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        desired = decode(bytes(message.payload)).desired
        # Only a higher generation than the device has seen counts.
        if desired.generation > self._observed:
            self._observed = desired.generation
            self.send([self.reported(report) for report in self.answer(desired)])

    def _next(self, kind: str) -> int:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind]

    def _now_ns(self) -> int:
        return time.time_ns() + self._clock_ahead_ns


class PersistentBroker(Broker):
    """A mosquitto that keeps sessions and queues on disk, and can be killed."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        super().__init__("mosquitto", folder, port)
        text = self._config.read_text("utf-8").replace("persistence false", "persistence true")
        # Saved at each change: what was acknowledged outlives a kill.
        text += f"persistence_location {folder}/\nautosave_interval 1\nautosave_on_changes true\n"
        text += "max_queued_messages 0\n"
        self._config.write_text(text, "utf-8")

    def kill(self) -> None:
        """Ends it as a power cut would."""
        kill(self)


def kill(broker: Broker) -> None:
    """Ends a broker without a chance to say or save anything."""
    process = broker._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    broker.stop()


@contextmanager
def desired_seen(broker: Broker) -> Iterator[queue.Queue[fleet_pb2.Event]]:
    """What is published as desired, as it comes."""
    seen: queue.Queue[fleet_pb2.Event] = queue.Queue()
    ready = threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    client.on_connect = lambda c, *_: c.subscribe("edgellm/v1/+/+/+/desired", qos=1)
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda _c, _d, message: seen.put(decode(bytes(message.payload)))
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        assert ready.wait(_READY_S)
        yield seen
    finally:
        client.disconnect()
        client.loop_stop()
