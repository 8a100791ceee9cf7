"""The main job on this machine, with nothing mocked: build, push, generate, telemetry.

An agent here simulates an Orin Nano 8 GB: it enforces that board's memory limit; the speed is this machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho
from demo_broker import Broker, running_broker
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from rich.console import Console
from rich.table import Table

from edgellm.bundle import Bundle
from edgellm.client import Client, Completion, Message
from edgellm.fleet.topics import decode
from edgellm.v1 import telemetry_pb2

DEVICE = "jetson-01"
PROFILE = "orin-nano-8gb"
QUESTION = "Why do electronic devices need a heat sink? Answer in two sentences."
START_S = 30.0
TELEMETRY_S = 10.0

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Runs the demo; every process that it starts is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    parser.add_argument(
        "--work", type=Path, default=Path(".edgellm/demo"), help="built engines are kept here"
    )
    arguments = parser.parse_args()
    os.environ["EDGELLM_HOME"] = str(arguments.work.resolve())
    bundle = build(arguments.model, arguments.work / "smollm2-int4.bundle")
    with (
        tempfile.TemporaryDirectory(prefix="edgellm-demo-") as scratch,
        running_broker() as broker,
        listening(broker) as heard,
        running_agent(Path(scratch), broker) as socket,
    ):
        step(f"Push it to {DEVICE}: an agent on this machine with the memory of an {PROFILE}")
        edgellm("device", "add", DEVICE, f"unix://{socket}")
        edgellm("push", "engine", "--device", DEVICE)
        with Client(f"unix://{socket}") as client:
            completion = chat(client)
            show_telemetry(heard, broker)
            closing_table(arguments.model, bundle, client, completion, heard)


def build(model: Path, target: Path) -> Bundle:
    """Builds the INT4 engine unless it is there from an earlier run."""
    step("Build an INT4 engine from the checkpoint")
    if not target.exists():
        what = ("--precision", "int4", "--profile", PROFILE, "--name", "smollm2-135m-instruct")
        edgellm("build", str(model), *what, "--output", str(target))
    edgellm("inspect", str(target))
    return Bundle.open(target)


def chat(client: Client) -> Completion:
    """Streams one answer, a token at a time."""
    step("Ask it something, over gRPC on the local socket")
    console.print(f"[bold]user[/]       {QUESTION}\n[bold]assistant[/]  ", end="")
    with client.generate([Message("user", QUESTION)], max_tokens=200) as answer:
        for chunk in answer:
            console.print(chunk.text, end="", markup=False, soft_wrap=True)
        completion = answer.completion
    console.print()
    return completion


class Heard:
    """The latest message of each topic that came from the broker."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.by_topic: dict[str, bytes] = {}
        self.count = 0

    def take(self, topic: str, payload: bytes) -> None:
        """Called on the MQTT client's thread."""
        with self.news:
            self.by_topic[topic] = payload
            self.count += 1
            self.news.notify_all()

    def runtime(self) -> telemetry_pb2.Telemetry:
        """Waits for a record that knows of the answer just generated."""
        with self.news:
            if not self.news.wait_for(lambda: self._latest().runtime.generated_tokens_total > 0, TELEMETRY_S):
                sys.exit("error: no telemetry came over MQTT")
            return self._latest()

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
    client.on_message = lambda _client, _data, message: heard.take(message.topic, message.payload)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        yield heard
    finally:
        client.disconnect()
        client.loop_stop()


@contextlib.contextmanager
def running_agent(scratch: Path, broker: Broker) -> Iterator[Path]:
    """Starts `edgellm-agent run` and waits until its socket is there; ends it with SIGTERM."""
    socket = scratch / "agent.sock"
    config = scratch / "agent.toml"
    config.write_text(
        f'device = "{DEVICE}"\nprofile = "{PROFILE}"\nsimulate = true\n'
        f'state_dir = "{scratch / "state"}"\nsocket = "{socket}"\ndrain_s = 2\n'
        f'[mqtt]\nhost = "{broker.host}"\nport = {broker.port}\nprotocol = "{broker.protocols[0]}"\n'
    )
    log = scratch / "agent.log"
    with log.open("wb") as out:
        agent = subprocess.Popen([program("edgellm-agent"), "run", "--config", str(config)], stderr=out)
    try:
        deadline = time.monotonic() + START_S
        while not socket.exists():
            if agent.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: the agent did not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield socket
    finally:
        agent.send_signal(signal.SIGTERM)
        try:
            agent.wait(15)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def show_telemetry(heard: Heard, broker: Broker) -> None:
    """Shows the last message of each topic, as it came."""
    heard.runtime()
    step(f"What the device reported over MQTT ({broker.kind}, MQTT {broker.protocols[0]})")
    for topic, payload in sorted(heard.by_topic.items()):
        event = json.loads(payload)
        data = event.get("telemetry") or event.get("state")
        parts = {k: v for k, v in data.items() if k not in ("sequence", "time", "monotonic_ns")}
        console.print(f"[bold]{topic}[/]")
        for name, part in parts.items():
            console.print(f"  {name}: {json.dumps(part)}", soft_wrap=True)
    console.print(f"({heard.count} messages so far, one round a second)")


@dataclass(frozen=True)
class Row:
    """A line of the closing table."""

    what: str
    value: str


def closing_table(model: Path, bundle: Bundle, client: Client, completion: Completion, heard: Heard) -> None:
    """Sizes, times, speed and memory of this run."""
    (variant,) = bundle.variants
    plan = client.memory_plan()
    (engine,) = client.engines()
    precision = variant.config.precision
    total_s = completion.ttft_s + completion.decode_s
    rows = [
        Row("checkpoint", f"{_size(model) / 1e6:.1f} MB"),
        Row(
            "engine",
            f"{engine.size_bytes / 1e6:.1f} MB in {len(bundle.manifest(variant.digest).layers)} files",
        ),
        Row("precision", f"{precision.weights}, {precision.scheme}, groups of {precision.group_size}"),
        Row(
            "", f"head {precision.head}; embedding {precision.embedding}; activations {precision.activations}"
        ),
        Row(
            "why int4",
            "smallest; float minima keep the source's own grid (docs/performance.md has perplexities)",
        ),
        Row("load time", f"{heard.runtime().runtime.load_s:.2f} s"),
        Row(
            "time to first token",
            f"{completion.ttft_s * 1e3:.0f} ms for {completion.prompt_tokens} prompt tokens",
        ),
        Row(
            "decode",
            f"{completion.decode_tokens_per_s:.1f} tokens/s over {completion.completion_tokens} tokens",
        ),
        Row("whole answer", f"{total_s:.2f} s"),
        Row("KV cache", f"{completion.kv_bytes / 1e6:.1f} MB used of {plan.kv_bytes / 1e6:.1f} MB bound"),
        Row(
            "memory plan",
            f"{plan.available_bytes / 1e6:.0f} MB available: weights {plan.weights_bytes / 1e6:.0f}, "
            f"workspace {plan.workspace_bytes / 1e6:.0f}, headroom {plan.headroom_bytes / 1e6:.0f}, "
            f"KV up to {plan.kv_bytes / 1e6:.0f}",
        ),
    ]
    step("This run")
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(row.what, row.value)
    console.print(table)


def _size(model: Path) -> int:
    return model.stat().st_size if model.is_file() else sum(p.stat().st_size for p in model.iterdir())


def step(title: str) -> None:
    """A heading."""
    console.print(f"\n[bold cyan]# {title}[/]")


def program(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).parent / name)


def edgellm(*arguments: str) -> None:
    """Runs the CLI as a person would; ends the demo if it fails."""
    console.print(f"[bold]$ edgellm {' '.join(arguments)}[/]", soft_wrap=True)
    result = subprocess.run([program("edgellm"), *arguments], check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)


if __name__ == "__main__":
    main()
