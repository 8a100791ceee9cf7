"""The main job on this machine, through the real programs: build, sign, push, generate, telemetry, heat.

An agent here simulates an Orin Nano 8 GB: it enforces that board's memory limit, and in the last act reads
heat and power from a replayed recording; the speed is this machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo_broker import Broker, running_broker
from demo_heat import Board, excerpt, figure, heat_up
from demo_output import console, step
from demo_reader import Heard, listening
from rich.table import Table

from edgellm.bundle import Bundle
from edgellm.client import Client, Completion, Message
from edgellm.signing.keys import keys_dir

DEVICE = "jetson-01"
PROFILE = "orin-nano-8gb"
NAME = "smollm2-135m-instruct"
KEY = "demo-key"
QUESTION = "Why do electronic devices need a heat sink? Answer in two sentences."
START_S = 30.0
# On a board two minutes, by default.
PROBATION_S = 3
COMMIT_S = 30.0
WIDEST = 320


def main() -> None:
    """Runs the demo; every process that it starts is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    parser.add_argument(
        "--work", type=Path, default=Path(".edgellm/demo"), help="built engines are kept here"
    )
    arguments = parser.parse_args()
    os.environ["EDGELLM_HOME"] = str(arguments.work.resolve())
    built = arguments.work / "smollm2-int4.bundle"
    bundle = build(arguments.model, built)
    with (
        tempfile.TemporaryDirectory(prefix="edgellm-demo-") as scratch,
        running_broker() as broker,
        listening(broker) as heard,
    ):
        with running_agent(Path(scratch), broker) as target, Client(target) as client:
            know(target)
            push(client, sign(built))
            before = heard.generated_tokens()
            completion = chat(client)
            show_telemetry(heard, broker, before)
        first_run = heard.latest_run()
        # It finds its engine again by itself.
        with running_agent(Path(scratch), broker, excerpt(Path(scratch))) as target, Client(target) as client:
            board = heat_up(target, heard, first_run)
            closing_table(arguments.model, bundle, client, completion, board)


def build(model: Path, target: Path) -> Bundle:
    """Builds the INT4 engine unless it is there from an earlier run."""
    step("Build an INT4 engine from the checkpoint")
    if not target.exists():
        what = ("--precision", "int4", "--profile", PROFILE, "--name", NAME)
        edgellm("build", str(model), *what, "--output", str(target))
    edgellm("inspect", str(target))
    return Bundle.open(target)


def know(target: str) -> None:
    """Makes the device known under its name, and has it trust one key."""
    step(f"Have {DEVICE} trust a key: an agent on this machine with the memory of an {PROFILE}")
    edgellm("device", "add", DEVICE, target)
    if not (keys_dir() / f"{KEY}.key").exists():
        edgellm("key", "generate", KEY)
    edgellm("key", "trust", KEY, "--device", DEVICE)


def sign(built: Path) -> Path:
    """Shows that the engine is refused as it was built; gives a signed copy of its bundle.

    A copy, so that the next run finds it unsigned again.
    """
    step("Push it: refused, since nobody stands for it yet. Sign it")
    edgellm("push", "engine", str(built), "--device", DEVICE, refused=True)
    signed = built.with_name("release-1.bundle")
    shutil.rmtree(signed, ignore_errors=True)
    console.print(f"[bold]$ cp -r {built} {signed}[/]")
    shutil.copytree(built, signed)
    edgellm("sign", str(signed), "--key", KEY, "--release", "1")
    return signed


def push(client: Client, signed: Path) -> None:
    """Brings the engine to the device, and waits until it has proven itself there."""
    step(f"Push it again; it answers at once, and is watched for {PROBATION_S} s before it is relied on")
    edgellm("push", "engine", str(signed), "--device", DEVICE)
    deadline = time.monotonic() + COMMIT_S
    while not any(engine.active and engine.state == "COMMITTED" for engine in client.engines()):
        if time.monotonic() > deadline:
            sys.exit(f"error: the engine was not committed within {COMMIT_S:.0f} s")
        time.sleep(0.1)
    edgellm("engine", "history", "--device", DEVICE)


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


@contextlib.contextmanager
def running_agent(scratch: Path, broker: Broker, settings: str = "") -> Iterator[str]:
    """Starts `edgellm-agent run` and waits until its socket is there; ends it with SIGTERM."""
    socket = scratch / "agent.sock"
    config = scratch / "agent.toml"
    config.write_text(
        f'device = "{DEVICE}"\nprofile = "{PROFILE}"\nsimulate = true\n'
        f'state_dir = "{scratch / "state"}"\nsocket = "{socket}"\ndrain_s = 2\n'
        f"{settings}\n"
        f'[mqtt]\nhost = "{broker.host}"\nport = {broker.port}\nprotocol = "{broker.protocols[0]}"\n'
        # No deadband: every record comes, not only those that say something new.
        "max_silence_s = 0\n"
        f"[lifecycle]\nprobation_s = {PROBATION_S}\n"
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
        yield f"unix://{socket}"
    finally:
        agent.send_signal(signal.SIGTERM)
        try:
            agent.wait(15)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def show_telemetry(heard: Heard, broker: Broker, before: int) -> None:
    """Shows the last message of each topic, as it came but for its length, once the answer was counted."""
    heard.wait_for_tokens(before)
    step(f"What the device reported over MQTT ({broker.kind}, MQTT {broker.protocols[0]})")
    for topic, payload in sorted(heard.by_topic.items()):
        data = next(part for part in json.loads(payload).values() if isinstance(part, dict))
        parts = {k: v for k, v in data.items() if k not in ("sequence", "time", "monotonic_ns")}
        console.print(f"[bold]{topic}[/]")
        for name, part in parts.items():
            text = json.dumps(part)
            console.print(f"  {name}: {text if len(text) <= WIDEST else text[:WIDEST] + ' …'}", markup=False)
    console.print(f"({heard.count} messages so far; every record, since the deadband is off here)")


@dataclass(frozen=True)
class Row:
    """A line of the closing table."""

    what: str
    value: str


def closing_table(model: Path, bundle: Bundle, client: Client, completion: Completion, board: Board) -> None:
    """Sizes, times, speed, memory, heat and energy of this run."""
    step("This run")
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    for row in (
        *_engine_rows(model, bundle, client),
        *_answer_rows(client, completion, board),
        *_heat_rows(board),
    ):
        table.add_row(row.what, row.value)
    console.print(table)


def _engine_rows(model: Path, bundle: Bundle, client: Client) -> Iterator[Row]:
    (variant,) = bundle.variants
    (engine,) = client.engines()
    precision = variant.config.precision
    files = len(bundle.manifest(variant.digest).layers)
    yield Row("checkpoint", f"{_size(model) / 1e6:.1f} MB")
    yield Row("engine", f"{engine.size_bytes / 1e6:.1f} MB in {files} files")
    yield Row("precision", f"{precision.weights}, {precision.scheme}, groups of {precision.group_size}")
    rest = f"head {precision.head}; embedding {precision.embedding}; activations {precision.activations}"
    yield Row("", rest)
    why = "smallest; float minima keep the source's own grid (docs/performance.md has perplexities)"
    yield Row("why int4", why)


def _answer_rows(client: Client, completion: Completion, board: Board) -> Iterator[Row]:
    plan = client.memory_plan()
    yield Row("load time", f"{board.now.runtime.load_s:.2f} s")
    first = f"{completion.ttft_s * 1e3:.0f} ms for {completion.prompt_tokens} prompt tokens"
    yield Row("time to first token", first)
    speed = f"{completion.decode_tokens_per_s:.1f} tokens/s over {completion.completion_tokens} tokens"
    yield Row("decode", speed)
    yield Row("whole answer", f"{completion.ttft_s + completion.decode_s:.2f} s")
    used, bound = completion.kv_bytes / 1e6, plan.kv_bytes / 1e6
    yield Row("KV cache", f"{used:.1f} MB used of {bound:.1f} MB bound")
    yield Row(
        "memory plan",
        f"{plan.available_bytes / 1e6:.0f} MB available: weights {plan.weights_bytes / 1e6:.0f}, "
        f"workspace {plan.workspace_bytes / 1e6:.0f}, headroom {plan.headroom_bytes / 1e6:.0f}, "
        f"KV up to {bound:.0f}",
    )


def _heat_rows(board: Board) -> Iterator[Row]:
    yield Row("governor", f"{' → '.join(board.states)}, pace down to {board.least_pace:.2f} (board replayed)")
    runtime, power = board.now.runtime, board.now.power
    mixed = "this machine's tokens over the replayed board's joules"
    yield Row("tokens per joule", f"{figure(runtime, 'tokens_per_joule', '.2f')}: {mixed}")
    energy = figure(power, "energy_total_j", ".0f")
    yield Row("energy", f"{energy} J (replayed) for {runtime.generated_tokens_total} tokens")


def _size(model: Path) -> int:
    return model.stat().st_size if model.is_file() else sum(p.stat().st_size for p in model.iterdir())


def program(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).parent / name)


def edgellm(*arguments: str, refused: bool = False) -> None:
    """Runs the CLI as a person would; ends the demo if that fails, or is not refused where it should be."""
    console.print(f"[bold]$ edgellm {' '.join(arguments)}[/]", soft_wrap=True)
    result = subprocess.run([program("edgellm"), *arguments], check=False)
    if refused and result.returncode == 0:
        sys.exit("error: that should have been refused")
    if not refused and result.returncode != 0:
        sys.exit(result.returncode)


if __name__ == "__main__":
    main()
