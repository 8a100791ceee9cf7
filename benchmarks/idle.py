"""What an agent without an engine costs a board: memory, and CPU at one telemetry record a second."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.agent import running_agent
from benchmarks.inputs import Inputs
from benchmarks.report import Bound, Row
from scripts.demo_broker import Broker, running_broker

_SETTLE_S = 5.0
_WATCH_S = 30.0
_MIB = 1 << 20


def idle_agent(inputs: Inputs) -> list[Row]:
    """With a real broker on loopback, and somebody who counts what arrives."""
    with running_broker() as broker:
        mqtt_settings = {"host": broker.host, "port": broker.port, "protocol": broker.protocols[0]}
        # Without the deadband: it would hold back most of what an idle board has to say.
        every_record = {"interval_s": 1.0, "max_silence_s": 0}
        settings = {"telemetry_interval_s": 1.0, "mqtt": {**mqtt_settings, **every_record}}
        with _arrivals(broker) as arrivals, running_agent(inputs.cache, settings) as agent:
            pid = agent.process.pid
            time.sleep(_SETTLE_S)
            before_s, before_messages, began = _cpu_s(pid), len(arrivals), time.monotonic()
            time.sleep(_WATCH_S)
            elapsed_s = time.monotonic() - began
            cpu_percent = 100 * (_cpu_s(pid) - before_s) / elapsed_s
            messages = len(arrivals) - before_messages
            memory = _memory_mib(pid)
    if messages == 0:
        raise RuntimeError("no telemetry arrived at the broker")
    settings_text = f"{elapsed_s:.0f} s, telemetry at 1 Hz, {messages} MQTT messages arrived ({broker.kind})"
    return [
        Row(
            benchmark="idle",
            what="agent without an engine: resident memory",
            ours=f"RSS {memory['Rss']:.1f}, PSS {memory['Pss']:.1f}, anonymous {memory['Anonymous']:.1f} MiB",
            peer="",
            figure=memory["Rss"],
            unit="MiB",
            floor=Bound(at_most=90),
            goal=Bound(at_most=70),
            settings=settings_text,
        ),
        Row(
            benchmark="idle",
            what="agent without an engine: CPU",
            ours=f"{cpu_percent:.2f} % of a core",
            peer="",
            figure=cpu_percent,
            unit="%",
            floor=Bound(at_most=1),
            settings=settings_text,
        ),
    ]


@contextlib.contextmanager
def _arrivals(broker: Broker) -> Iterator[list[str]]:
    """Topics of what arrives at the broker, as it comes."""
    topics: list[str] = []
    ready = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    client.on_connect = lambda c, *_: c.subscribe("#")
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = lambda _client, _data, message: topics.append(message.topic)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        if not ready.wait(10):
            raise RuntimeError("the broker does not take a subscription")
        yield topics
    finally:
        client.disconnect()
        client.loop_stop()


def _cpu_s(pid: int) -> float:
    # The command's name may hold blanks and brackets; what counts comes after the last one.
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_mib(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()[1:]
    words = (line.split() for line in lines)
    return {word[0].rstrip(":"): int(word[1]) * 1024 / _MIB for word in words}
