"""A real MQTT broker for tests, and a listener that collects what devices publish there."""

import contextlib
import queue
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgellm.fleet.topics import decode
from edgellm.v1 import fleet_pb2
from scripts.demo_broker import Broker, find_mosquitto, running_broker

__all__ = ["Broker", "Listener", "Received", "find_mosquitto", "listening", "running_broker"]


@dataclass(frozen=True)
class Received:
    """One message as the broker delivered it; content type and expiry only with MQTT 5."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    content_type: str | None
    expiry_s: int | None
    correlation_data: bytes | None

    @property
    def leaf(self) -> str:
        return self.topic.rsplit("/", 1)[1]

    @property
    def event(self) -> fleet_pb2.Event:
        return decode(self.payload)


class Listener:
    """Collects messages; every wait has a deadline."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Received] = queue.Queue()

    def put(self, message: paho.MQTTMessage) -> None:
        properties = message.properties
        self._queue.put(
            Received(
                message.topic,
                bytes(message.payload),
                message.qos,
                message.retain,
                getattr(properties, "ContentType", None),
                getattr(properties, "MessageExpiryInterval", None),
                getattr(properties, "CorrelationData", None),
            )
        )

    def wait_for(self, wanted: Callable[[Received], bool], deadline_s: float = 15.0) -> Received:
        """Give the first wanted message, dropping those before it; raises AssertionError at the deadline."""
        deadline = time.monotonic() + deadline_s
        seen: list[str] = []
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                message = self._queue.get(timeout=left)
                if wanted(message):
                    return message
                seen.append(f"{message.topic} {message.payload[:80]!r}")
        raise AssertionError(f"not received within {deadline_s} s; seen: {seen}")

    def drain(self) -> list[Received]:
        """Give what has come and was not asked for."""
        messages = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._queue.get_nowait())
        return messages


@contextlib.contextmanager
def listening(
    broker: Broker,
    topic: str = "edgellm/#",
    protocol: str | None = None,
    prepare: Callable[[paho.Client], None] = lambda _: None,
    durable: str | None = None,
) -> Iterator[Listener]:
    """Subscribe with QoS 1 until the context ends, again after the broker's restarts.

    `prepare` sees the client before it connects, to give it a certificate or a password. A durable listener
    is known to the broker by name, and finds what came while it was away.
    """
    listener, subscribed = Listener(), queue.Queue[bool]()
    five = (protocol or broker.protocols[0]) == "5"
    version = MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311
    # An identity of its own: amqtt takes all clients without one for the same.
    client = paho.Client(
        CallbackAPIVersion.VERSION2, client_id=durable or f"listener-{uuid.uuid4()}", protocol=version
    )
    client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
    client.on_subscribe = lambda *_: subscribed.put(True)

    def on_message(_client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        # amqtt was seen to deliver a retained state of another topic, too.
        if paho.topic_matches_sub(topic, message.topic):
            listener.put(message)

    client.on_message = on_message
    client.reconnect_delay_set(1, 1)
    prepare(client)
    if durable is None:
        client.connect_async(broker.host, broker.port, keepalive=10)
    else:
        kept = Properties(PacketTypes.CONNECT)
        kept.SessionExpiryInterval = 3600
        client.connect_async(broker.host, broker.port, keepalive=10, clean_start=False, properties=kept)
    client.loop_start()
    try:
        _wait_for_subscription(broker, client, subscribed)
        yield listener
    finally:
        client.disconnect()
        client.loop_stop()


def _wait_for_subscription(broker: Broker, client: paho.Client, subscribed: queue.Queue[bool]) -> None:
    """amqtt, while others publish on a busy machine, was seen to leave a subscription without an answer."""
    if broker.kind == "mosquitto":
        subscribed.get(timeout=15)
        return
    for _ in range(3):
        with contextlib.suppress(queue.Empty):
            subscribed.get(timeout=5)
            return
        client.reconnect()
    raise AssertionError("amqtt answered none of three subscriptions")
