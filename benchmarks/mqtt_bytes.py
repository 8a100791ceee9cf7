"""What a device costs its uplink: bytes per device-hour by encoding, deadband and load; an outage's catch-up.

    python -m benchmarks.mqtt_bytes

The records are synthetic: the parts of an Orin Nano as its files show them (tests/support/boards.py), moved
by seeded noise as a board's sensors move (0.1 °C, 2 % of power, CPU load between seconds). They go through
the real publisher to a real broker, behind a proxy that counts what passes; an hour is ten times a tenth of
one. What TCP and IP add is estimated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgellm.fleet.topics import DeviceTopics, Encoding, encode, telemetry_events
from edgellm.v1 import telemetry_pb2
from edgellm_agent.mqtt.deadband import Deadband
from edgellm_agent.mqtt.outbox import Message, Outbox
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.telemetry.sysfs import SysfsSource
from scripts.demo_broker import Broker, running_broker
from tests.support import boards

Load = Literal["idle", "busy"]
_RECORDS = 360
_HOUR = 3600 / _RECORDS
# IPv4 and TCP with timestamps, per segment. A message with QoS 0 is a segment and its acknowledgement; with
# QoS 1 there is the broker's answer in between, which acknowledges at once, and is acknowledged in turn.
_SEGMENT = 52
_SEGMENTS = {0: 2, 1: 3}


class Stream:
    """Records of a board, as fast as they are asked for, on a clock of their own: one a second."""

    def __init__(self, load: Load, count: int, seed: int = 7) -> None:
        self._load = load
        self._count = count
        self._draw = random.Random(seed)
        self._taken = asyncio.Event()
        with tempfile.TemporaryDirectory() as folder:
            source = SysfsSource(boards.build(Path(folder), boards.ORIN_NANO))
            self._parts = {probe.part: probe.read() for probe in source.probes}

    async def records(self, interval_s: float = 0.0) -> AsyncIterator[telemetry_pb2.Telemetry]:  # noqa: ARG002
        """As the sampler gives them; each one once the one before is on its way."""
        for sequence in range(1, self._count + 1):
            yield self.record(sequence)
            await self._taken.wait()
            self._taken.clear()

    def next(self) -> None:
        """Let the next record come."""
        self._taken.set()

    def record(self, sequence: int) -> telemetry_pb2.Telemetry:
        """The record of a second."""
        record = telemetry_pb2.Telemetry(sequence=sequence, monotonic_ns=sequence * 10**9)
        record.time.FromNanoseconds(1_760_000_000 * 10**9 + sequence * 10**9)
        for name, part in self._parts.items():
            if part is not None:
                getattr(record, name).CopyFrom(part)
        busy = self._load == "busy"
        self._heat(record, 15.0 * (1 - math.exp(-sequence / 120)) if busy else 0.0)
        self._work(record, sequence, busy)
        record.governor.CopyFrom(telemetry_pb2.Governor(state="NOMINAL", pace=1.0, max_sequences=8))
        record.uplink.CopyFrom(telemetry_pb2.Uplink(connected=True, connections_total=1))
        return record

    def _heat(self, record: telemetry_pb2.Telemetry, risen: float) -> None:
        for zone in record.thermal.zones:
            zone.celsius = round((zone.celsius + risen + self._draw.gauss(0, 0.1)) * 32) / 32
        record.thermal.max_celsius = max(zone.celsius for zone in record.thermal.zones)
        record.thermal.margin_celsius = 99.0 - record.thermal.max_celsius
        for rail in record.power.rails:
            rail.power_mw = round(rail.power_mw * (1 + risen / 15) * self._draw.gauss(1, 0.02), 2)
        record.power.total_mw = record.power.rails[0].power_mw
        record.power.energy_total_j = 5.0 * record.sequence

    def _work(self, record: telemetry_pb2.Telemetry, sequence: int, busy: bool) -> None:
        record.compute.cpu_percent = round(max(0.0, self._draw.gauss(45 if busy else 4, 6)), 1)
        record.compute.gpu_percent = round(min(100.0, max(0.0, self._draw.gauss(92, 5))), 1) if busy else 0.0
        record.memory.available_bytes += self._draw.randrange(-(1 << 22), 1 << 22)
        runtime = record.runtime
        runtime.state, runtime.engine = "serving", "sha256:" + "a" * 64
        runtime.kv_bound_bytes, runtime.worker_rss_bytes, runtime.load_s = 2 << 30, 1 << 30, 4.2
        if busy:
            # Requests come and go every half minute.
            phase = sequence // 30 % 3
            runtime.running_sequences = 1 + phase
            runtime.decode_tokens_per_s = round(14.0 * (1 + phase) * self._draw.gauss(1, 0.03), 2)
            runtime.kv_used_bytes = (20 << 20) * (1 + phase) + sequence % 30 * 100_000
            runtime.generated_tokens_total, runtime.requests_total = 28 * sequence, sequence // 10
            runtime.tokens_per_joule = round(2.8 * self._draw.gauss(1, 0.02), 3)
            runtime.time_to_first_token.CopyFrom(_percentiles(0.4, 0.7, 0.9, 6))
            runtime.inter_token_latency.CopyFrom(_percentiles(0.071, 0.09, 0.12, 1700))


def _percentiles(p50_s: float, p95_s: float, p99_s: float, count: int) -> telemetry_pb2.Percentiles:
    return telemetry_pb2.Percentiles(p50_s=p50_s, p95_s=p95_s, p99_s=p99_s, count=count)


class CountingProxy:
    """Passes bytes on between a device and the broker, and counts them."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.up = self.down = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[CountingProxy]:
        """Listen as long as the context lasts."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._broker.host, self._broker.port)
        await asyncio.gather(self._pass(reader, back, up=True), self._pass(there, writer, up=False))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        while data := await reader.read(65536):
            if up:
                self.up += len(data)
            else:
                self.down += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()


@dataclass(frozen=True)
class Cost:
    """What a tenth of an hour cost."""

    messages: int
    payload: int
    mqtt: int
    qos: int

    def row(self, what: str) -> str:
        """A line of the table, per hour."""
        wire = self.mqtt + self.messages * _SEGMENTS[self.qos] * _SEGMENT
        figures = (self.messages * _HOUR, *(part * _HOUR / 1e6 for part in (self.payload, self.mqtt, wire)))
        return f"| {what} | {figures[0]:,.0f} | {figures[1]:.2f} | {figures[2]:.2f} | {figures[3]:.2f} |"


async def measure(broker: Broker, load: Load, encoding: Encoding, max_silence_s: float, qos: int) -> Cost:
    """Publish the records of a tenth of an hour, one after the other."""
    stream = Stream(load, _RECORDS)
    async with CountingProxy(broker).running() as proxy:
        settings = MqttSettings.model_validate(
            {
                "host": "127.0.0.1",
                "port": proxy.port,
                "encoding": encoding,
                "max_silence_s": max_silence_s,
                "qos": qos,
                "keepalive_s": 3600,
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            publisher = MqttPublisher(
                settings, stream, device="jetson-01", state_dir=Path(folder), agent_version="0.1.0"
            )
            messages = _counting(publisher)
            publisher.start()
            while not publisher.connected or publisher.part().queued_telemetry:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            up, down = proxy.up, proxy.down
            messages.clear()
            for _ in range(_RECORDS - 1):
                stream.next()
                await asyncio.sleep(0)
                while publisher._live:  # noqa: SLF001, ASYNC110
                    await asyncio.sleep(0.0005)
            await asyncio.sleep(0.2)
            cost = Cost(len(messages), sum(messages), proxy.up - up + proxy.down - down, qos)
            await publisher.close()
    return cost


def _counting(publisher: MqttPublisher) -> list[int]:
    """The payload of each live message, as it is sent."""
    sizes: list[int] = []
    send = publisher._send_live  # noqa: SLF001

    def counted(message: Message) -> bool:
        sizes.append(len(message.payload))
        return send(message)

    publisher._send_live = counted  # type: ignore[method-assign]  # noqa: SLF001
    return sizes


def offline(load: Load, interval_s: int, hours: int) -> tuple[list[Message], int]:
    """What an outage leaves in the outbox, thinned out and behind the deadband; and its number of records."""
    stream, deadband = Stream(load, 0), Deadband({}, max_silence_s=60)
    topics, kept = DeviceTopics("default", "default", "jetson-01"), []
    for sequence in range(1, hours * 3600 + 1, interval_s):
        record = stream.record(sequence)
        for name, event in telemetry_events(topics, 1, record, deadband.take(record)):
            kept.append(Message(topics.telemetry(name), encode(event, "json"), False, 0))
    return kept, hours * 3600 // interval_s


async def catch_up(broker: Broker, kept: list[Message], rate: float) -> tuple[float, float, float]:
    """Seconds to write an outage in batches, the file's MB, and seconds until the broker has it all."""
    with tempfile.TemporaryDirectory() as folder:
        outbox = Outbox(Path(folder) / "outbox.db", 1 << 30)
        began = time.monotonic()
        for first in range(0, len(kept), 9):
            outbox.add(kept[first : first + 9])
        write_s = time.monotonic() - began
        outbox.close()
        size_mb = (Path(folder) / "outbox.db").stat().st_size / 1e6
        settings = MqttSettings(host=broker.host, port=broker.port, catch_up_messages_per_s=rate)
        publisher = MqttPublisher(
            settings, Stream("idle", 0), device="jetson-01", state_dir=Path(folder), agent_version="0.1.0"
        )
        publisher.start()
        while not publisher.connected or not publisher.part().queued_telemetry:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        began = time.monotonic()
        while publisher.part().queued_telemetry:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        drain_s = time.monotonic() - began
        await publisher.close()
    return write_s, size_mb, drain_s


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000.0, help="messages per second of the catch-up")
    options = parser.parse_args()
    with running_broker("mosquitto") as broker:
        for line in asyncio.run(_tables(broker, options.rate)):
            print(line)


async def _tables(broker: Broker, rate: float) -> list[str]:
    lines = ["| | messages/h | payload MB/h | MQTT MB/h | with TCP/IP MB/h |", "|---|---|---|---|---|"]
    for load, silence_s, encoding, qos in _cases():
        cost = await measure(broker, load, encoding, silence_s, qos)
        band = "deadband" if silence_s else "every record"
        lines.append(cost.row(f"{load}, {band}, {encoding}, QoS {qos}"))
    lines += ["", "| 24 h offline | records | messages | MB of file | written in s | sent in s |"]
    lines += ["|---|---|---|---|---|---|"]
    loads: tuple[Load, ...] = ("idle", "busy")
    for load in loads:
        kept, records = offline(load, 10, 24)
        write_s, size_mb, drain_s = await catch_up(broker, kept, rate)
        lines.append(f"| {load} | {records} | {len(kept)} | {size_mb:.1f} | {write_s:.1f} | {drain_s:.1f} |")
    return lines


def _cases() -> Iterator[tuple[Load, float, Encoding, int]]:
    loads: tuple[Load, ...] = ("idle", "busy")
    encodings: tuple[Encoding, ...] = ("json", "protobuf")
    for load in loads:
        for silence_s in (0.0, 60.0):
            for encoding in encodings:
                yield load, silence_s, encoding, 1
    yield "busy", 60.0, "json", 0


if __name__ == "__main__":
    main()
