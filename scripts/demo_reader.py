"""Somebody who listens to the demo's device at the broker."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator

import paho.mqtt.client as paho
from demo_broker import Broker
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgellm.fleet.topics import decode
from edgellm.v1 import fleet_pb2, telemetry_pb2

TELEMETRY_S = 10.0


class Heard:
    """What came from the broker: the latest payload of each topic, and all events in a queue."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.by_topic: dict[str, bytes] = {}
        self.count = 0
        self._queue: queue.SimpleQueue[fleet_pb2.Event] = queue.SimpleQueue()

    def take(self, topic: str, payload: bytes) -> None:
        """Called on the MQTT client's thread."""
        with self.news:
            self.by_topic[topic] = payload
            self.count += 1
            self.news.notify_all()
        self._queue.put(decode(payload))

    def latest_run(self) -> int:
        """Number of the agent's start that was heard last."""
        with self.news:
            return max(decode(payload).run for payload in self.by_topic.values())

    def events(self, after_run: int, within_s: float) -> Iterator[fleet_pb2.Event]:
        """Events of later starts of the agent, in the order of their coming, for so many seconds."""
        until = time.monotonic() + within_s
        with contextlib.suppress(queue.Empty):
            while (left_s := until - time.monotonic()) > 0:
                event = self._queue.get(timeout=left_s)
                if event.run > after_run:
                    yield event

    def generated_tokens(self) -> int:
        """Tokens that the device says it has generated so far; its engine's first try counts, too."""
        with self.news:
            return self._latest().runtime.generated_tokens_total

    def wait_for_tokens(self, before: int) -> None:
        """Waits for a record that knows of the whole of an answer generated since."""

        def told() -> bool:
            runtime = self._latest().runtime
            return runtime.generated_tokens_total > before and not runtime.running_sequences

        with self.news:
            if not self.news.wait_for(told, TELEMETRY_S):
                sys.exit("error: no telemetry came over MQTT")

    def _latest(self) -> telemetry_pb2.Telemetry:
        payload = next((p for t, p in self.by_topic.items() if t.endswith("/tele/runtime")), None)
        return telemetry_pb2.Telemetry() if payload is None else decode(payload).telemetry


@contextlib.contextmanager
def listening(broker: Broker) -> Iterator[Heard]:
    """Collects what devices publish."""
    heard = Heard()
    protocol = MQTTProtocolVersion.MQTTv5 if "5" in broker.protocols else MQTTProtocolVersion.MQTTv311
    client = paho.Client(CallbackAPIVersion.VERSION2, "edgellm-demo-reader", protocol=protocol)
    client.on_connect = lambda c, *_: c.subscribe("edgellm/v1/#", qos=1)
    client.on_message = lambda _client, _data, message: heard.take(message.topic, bytes(message.payload))
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()
