"""The demo's second act: a replayed board gets hot under real requests, and the governor paces them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from demo_output import console, step
from demo_reader import Heard
from google.protobuf.message import Message as Part

from edgellm.cli.readings import ABSENT
from edgellm.client import Client, Message
from edgellm.errors import EdgellmError, RemoteError
from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.telemetry.recording import Content, Snapshot, encoded
from edgellm_agent.telemetry.replay import load_recording

# The shipped scenario, from where its board has become warm, and how much faster than a board's its time is.
SCENARIO, FROM_S, SPEED = "heat-up", 100.0, 8
# When its load ends, seconds of the board (scripts/scenarios.py).
LOAD_ENDS_S = 230.0
# The pace rises by 0.1 a second: the demo has seen enough when half is back.
RECOVERED = 0.5
CLIENTS = 2
TASK = "Explain how heat moves from a chip to the air, step by step and in detail."
# Of this machine's time; it takes 21 s.
DEADLINE_S = 45.0
# Of a record, what is shown here; each comes with a topic of its own.
PARTS = ("thermal", "power", "runtime", "governor")
# A row each two records.
ROW_EVERY_S = 2 * SPEED
HEADER = "BOARD    TEMP     MARGIN    POWER   GOVERNOR  PACE  TOK/S  TOK/J"


@dataclass
class Board:
    """The replayed board as its messages show it; times are the board's, seconds of the recording."""

    now: telemetry_pb2.Telemetry = field(default_factory=telemetry_pb2.Telemetry)
    seconds: float = 0.0
    least_pace: float = 1.0
    states: list[str] = field(default_factory=list)
    """Every state of the governor, in the order in which it came."""
    _began_ns: int | None = None

    def take(self, record: telemetry_pb2.Telemetry) -> bool:
        """Takes the parts of a record that a message brought; True when the record is whole."""
        if record.sequence != self.now.sequence:
            self.now = telemetry_pb2.Telemetry(sequence=record.sequence)
        for part, value in record.ListFields():
            if part.name in PARTS:
                getattr(self.now, part.name).CopyFrom(value)
        if self._began_ns is None:
            # The replay begins with the first record, which may have come before there was a connection.
            self._began_ns = record.monotonic_ns - (record.sequence - 1) * 1_000_000_000
        self.seconds = FROM_S + (record.monotonic_ns - self._began_ns) / 1e9 * SPEED
        if record.HasField("governor"):
            self.least_pace = min(self.least_pace, record.governor.pace)
            if record.governor.state not in self.states[-1:]:
                self.states.append(record.governor.state)
        return record.HasField("runtime")

    @property
    def recovered(self) -> bool:
        """Its load is over, and the engine has got time back."""
        return self.seconds > LOAD_ENDS_S and self.now.governor.pace >= RECOVERED

    def row(self) -> str:
        """One line below `HEADER`."""
        thermal, power, runtime = self.now.thermal, self.now.power, self.now.runtime
        return (
            f"{self.seconds:3.0f} s  {figure(thermal, 'max_celsius', '5.1f')} °C"
            f"  {figure(thermal, 'margin_celsius', '5.1f')} °C"
            f"  {figure(power, 'total_mw', '4.1f', 1e-3)} W"
            f"  {self.now.governor.state:<8}  {self.now.governor.pace:4.2f}"
            f"  {runtime.decode_tokens_per_s:5.1f}  {figure(runtime, 'tokens_per_joule', '5.2f')}"
        )


def figure(part: Part, name: str, form: str, factor: float = 1.0) -> str:
    """A figure of a record; one that is absent is a dash and never a zero."""
    if not part.HasField(name):
        return f"{ABSENT:>{form.partition('.')[0]}}"
    return format(getattr(part, name) * factor, form)


def excerpt(folder: Path) -> str:
    """Writes the scenario's end into the folder; gives the setting that replays it."""
    recorded, files, path = load_recording(SCENARIO), dict[str, Content](), folder / f"{SCENARIO}.jsonl"
    lines = [encoded(recorded.header)]
    for snapshot in recorded.snapshots:
        files.update(snapshot.files)
        if snapshot.t_s == FROM_S:
            lines.append(encoded(Snapshot(t_s=0.0, files=files)))
        elif snapshot.t_s > FROM_S:
            lines.append(encoded(Snapshot(t_s=snapshot.t_s - FROM_S, files=snapshot.files)))
    path.write_bytes(b"".join(lines))
    return f'telemetry_source = "replay:{path}?speed={SPEED}"'


def heat_up(target: str, heard: Heard, after_run: int) -> Board:
    """Shows what the board, the governor and the engine do after that run of the agent, until it recovers."""
    step(f"Heat: {CLIENTS} clients ask without a pause, and a replayed board gets hot")
    console.print(
        "The agent was started again and plays a recording back: an Orin Nano's heat and power, computed,\n"
        f"at {SPEED} times their speed. The tokens are this machine's, so tokens per joule mix both and\n"
        "are no board's figure. A recording does not react: pacing the engine cannot cool this board."
    )
    console.print(f"\n[bold]{HEADER}[/]")
    board, next_row_s = Board(), 0.0
    with contextlib.ExitStack() as stack:
        refused: list[RemoteError] | None = None
        for event in heard.events(after_run, DEADLINE_S):
            if event.HasField("governor"):
                console.print(f"  evt/throttle {_told(event.governor)}", style="yellow")
            if not event.HasField("telemetry") or not board.take(event.telemetry):
                continue
            if refused is None and board.now.runtime.state == "serving":
                refused = stack.enter_context(asking(target))
            if board.recovered or board.seconds >= next_row_s:
                console.print(board.row())
                next_row_s = board.seconds + ROW_EVERY_S - SPEED / 2
            if board.recovered:
                break
        else:
            sys.exit(f"error: the governor gave the engine no time back within {DEADLINE_S:.0f} s")
    if refused:
        console.print(f"({len(refused)} requests were refused with UNAVAILABLE meanwhile)")
    console.print("The pace rises by 0.1 a second; a state is left once it was not needed for two minutes.")
    return board


def _told(change: fleet_pb2.GovernorChanged) -> str:
    now = change.now
    return (
        f"{change.before} → {now.state}, for {', '.join(now.reasons) or 'all is well'}:"
        f" {change.max_celsius:.1f} °C, {change.margin_celsius:.1f} °C to the trip point; pace {now.pace:.2f}"
    )


@contextlib.contextmanager
def asking(target: str) -> Iterator[list[RemoteError]]:
    """Clients that ask one thing after the other until the context ends; gives the refusals they got."""
    stop, refused = threading.Event(), list[RemoteError]()
    clients = [threading.Thread(target=_ask, args=(target, stop, refused)) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield refused
    finally:
        stop.set()
        for client in clients:
            client.join()


def _ask(target: str, stop: threading.Event, refused: list[RemoteError]) -> None:
    with Client(target) as client:
        while not stop.is_set():
            try:
                with client.generate([Message("user", TASK)], max_tokens=256) as answer:
                    for _ in answer:
                        if stop.is_set():
                            return
            except RemoteError as error:  # noqa: PERF203 - a refusal ends a request, not its client
                refused.append(error)
                stop.wait(error.retry_after_s or 1.0)
            except EdgellmError as error:
                console.print(f"error: {error}")
                return
