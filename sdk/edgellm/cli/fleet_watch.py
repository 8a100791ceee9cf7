"""The faces of `edgellm fleet watch`: a live table, plain lines, JSON for programs."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer

from edgellm.cli.fleet_table import (
    HEADERS,
    cells,
    clock,
    event_fields,
    event_words,
    iso,
    rich_table,
    summary,
    worst_first,
)
from edgellm.cli.output import print_json, print_table, printable
from edgellm.fleet.queries import FleetReader
from edgellm.fleet.receiver import Receiver
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.store import Retention
from edgellm.fleet.topics import TELEMETRY
from edgellm.fleet.validate import Incoming

_READY_S = 15.0
_REFRESH_S = 1.0
# What the broker has kept comes at once, and telemetry of the usual interval within this.
_ONCE_S = 2.0
# Events that wait to be printed; then the recording waits, and the broker keeps what comes.
_UNPRINTED = 10_000


class Watch:
    """A receiver at work, and the ways to look at it; `stop` ends each of them.

    Args:
        settings: The broker.
        path: The database; None looks without recording, and without being remembered by the broker.
        retention: What is kept.
        share: Name of the shared subscription; None: the database's own.
    """

    def __init__(
        self, settings: BrokerSettings, path: Path | None, retention: Retention, share: str | None
    ) -> None:
        self._settings = settings
        self._path = path
        self._retention = retention
        self._share = share
        self._stop = threading.Event()
        self._fresh: queue.Queue[Incoming] = queue.Queue(maxsize=_UNPRINTED)

    def table(self) -> None:
        """Shows the fleet until it is interrupted, worst device first."""
        from rich.live import Live

        with self._receiving(None) as (receiver, reader), Live(auto_refresh=False, screen=True) as live:
            since_ns = time.time_ns()
            while not self._stop.is_set():
                now_ns, views = time.time_ns(), reader.devices(since_ns)
                trouble = receiver.trouble or ("" if receiver.connected else "no broker; trying again")
                title = " | ".join(part for part in (summary(views, now_ns), trouble) if part)
                live.update(rich_table(views, now_ns, title), refresh=True)
                self._stop.wait(_REFRESH_S)

    def once(self) -> None:
        """Prints the fleet as it is within two seconds."""
        with self._receiving(None) as (_receiver, reader):
            since_ns = time.time_ns()
            self._stop.wait(_ONCE_S)
            now_ns, views = time.time_ns(), reader.devices(since_ns)
        print_table(HEADERS, [cells(view, now_ns) for view in worst_first(views, now_ns)])
        typer.echo(summary(views, now_ns))

    def lines(self, *, telemetry: bool, as_json: bool) -> None:
        """Prints each new event on a line until it is interrupted."""
        show = _print_event_json if as_json else _print_event
        with self._receiving(lambda item: telemetry or item.part not in TELEMETRY):
            while not self._stop.is_set():
                with contextlib.suppress(queue.Empty):
                    show(self._fresh.get(timeout=0.2))
                    if self._fresh.empty():
                        sys.stdout.flush()

    @contextlib.contextmanager
    def _receiving(self, wanted: Callable[[Incoming], bool] | None) -> Iterator[tuple[Receiver, FleetReader]]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._interruptible())
            path = self._path
            if path is None:
                path = (
                    Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgellm-fleet-")))
                    / "fleet.db"
                )
            receiver = Receiver(
                self._settings,
                path,
                retention=self._retention,
                share=self._share,
                lasting=self._path is not None,
                on_recorded=None if wanted is None else lambda items: self._hand_over(items, wanted),
            )
            stack.callback(receiver.close)
            stack.callback(self._stop.set)
            receiver.start()
            receiver.wait_ready(_READY_S)
            yield receiver, stack.enter_context(FleetReader(path))

    def _hand_over(self, items: Sequence[Incoming], wanted: Callable[[Incoming], bool]) -> None:
        for item in filter(wanted, items):
            while not self._stop.is_set():
                with contextlib.suppress(queue.Full):
                    self._fresh.put(item, timeout=0.2)
                    break

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the watch in order: what came is committed and acknowledged."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, lambda *_: self._stop.set()) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _print_event(item: Incoming) -> None:
    assert item.event is not None  # noqa: S101 - what was cleared tells nothing new
    words = printable(event_words(item.event)).replace("\n", " ")
    if item.part in TELEMETRY:
        words = f"telemetry {item.part}, record {item.event.sequence}"
    typer.echo(f"{clock(item.received_ns)}  {item.topics.group}/{item.topics.device}  {words}")


def _print_event_json(item: Incoming) -> None:
    assert item.event is not None  # noqa: S101 - what was cleared tells nothing new
    print_json(
        {
            "received_at": iso(item.received_ns),
            "tenant": item.topics.tenant,
            "group": item.topics.group,
            "device": item.topics.device,
            "retained": item.retained,
            "event": event_fields(item.event),
        }
    )
