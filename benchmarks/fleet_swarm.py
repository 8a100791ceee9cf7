"""Simulated devices that send everything of every record, all in one thread: a flood."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Sequence

from benchmarks.fleet_devices import EVENT_EVERY_S, Told, wire_bytes
from edgellm.fleet.topics import Encoding
from scripts.demo_broker import Broker
from tests.support.fleet_devices import Message, SimulatedDevice

_ROUND_S = 1.0
_SETTLE_S = 3.0
_EVENT_EVERY_ROUNDS = round(EVENT_EVERY_S / _ROUND_S)


class Swarm:
    """All devices in one thread: each publishes one record a second, at a moment of its own."""

    def __init__(self, broker: Broker, count: int, encoding: Encoding) -> None:
        self.devices = [
            SimulatedDevice(
                broker, f"jetson-{n:03}", group=f"line-{n % 10}", encoding=encoding, threaded=False
            )
            for n in range(count)
        ]
        self._selector = selectors.DefaultSelector()
        self.sent = self.sent_bytes = self.events = 0
        # Of a broker that is restarted, for which these devices are not made.
        self.back_s = 0.0
        for device in self.devices:
            device.connect()
            sock = device.client.socket()
            assert sock is not None
            self._selector.register(sock.fileno(), selectors.EVENT_READ, device)
            self._pump(0)

    @property
    def pids(self) -> list[int]:
        """All are in this process."""
        return [os.getpid()]

    def run(self, rounds: int) -> None:
        """Publishes so many records of each device, in real time."""
        began = time.monotonic()
        for number in range(rounds):
            for index, device in enumerate(self.devices):
                self._pump_until(began + (number + index / len(self.devices)) * _ROUND_S)
                messages = device.telemetry()
                if (number + index) % _EVENT_EVERY_ROUNDS == 0:
                    messages += device.events(1)
                    self.events += 1
                self._send(device, messages)

    def burst(self, device: SimulatedDevice, messages: Sequence[Message], window: int) -> None:
        """Publishes as fast as the broker acknowledges, with so many messages on their way."""
        waiting = [info for info in self._send(device, messages[:window]) if info.rc == 0]
        for message in messages[window:]:
            while not waiting[0].is_published():
                self._pump(0.01)
            waiting.pop(0)
            waiting += self._send(device, [message])

    def finish(self) -> Told:
        """What was sent; the broker has had time to acknowledge it."""
        self.settle(_SETTLE_S)
        return Told(self.sent, self.sent_bytes, self.events, self.sent - self.events)

    def close(self) -> None:
        """Says goodbye, so that no will is sent."""
        self.settle(1.0)
        for device in self.devices:
            device.client.disconnect()
        self._selector.close()

    def settle(self, seconds: float) -> None:
        """Reads what the broker still has to acknowledge."""
        self._pump_until(time.monotonic() + seconds)

    def _send(self, device: SimulatedDevice, messages: Sequence[Message]) -> list:  # type: ignore[type-arg]
        self.sent += len(messages)
        self.sent_bytes += sum(wire_bytes(item.topic, item.payload) for item in messages)
        return device.send(messages)

    def _pump_until(self, moment: float) -> None:
        while (left_s := moment - time.monotonic()) > 0:
            self._pump(min(left_s, 0.05))

    def _pump(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            key.data.client.loop_read()
            if key.data.client.want_write():
                key.data.client.loop_write()
