"""Takes what the fleet says from the broker into the store, and acknowledges only what is on disk."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho

from edgellm.errors import EdgellmError
from edgellm.fleet.connection import Connection
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.store import Reject, Retention, Store
from edgellm.fleet.validate import Incoming, RejectedError, check

log = logging.getLogger(__name__)

# How long the broker keeps events for a receiver that is away.
_EVENTS_EXPIRY_S = 7 * 86_400
# The same for telemetry: short, because the broker goes on handing a receiver that is away its share.
_TELEMETRY_EXPIRY_S = 300
# Messages that each of the two connections may have unacknowledged, thus waiting here.
_RECEIVE_MAXIMUM = 5000
# A batch ends with so many messages or so much time. One commit costs one sync of the disk, which may take a
# second where others use it: then batches grow, and what comes is still taken.
_BATCH_MESSAGES = 5000
_BATCH_S = 0.1
_POLL_S = 0.5
_PRUNE_EVERY_S = 60.0
_PRUNE_AGAIN_S = 1.0
_RETRY_S = 1.0
_MAX_SEATS = 64


@dataclass(frozen=True)
class _Arrival:
    """A message as the broker delivered it, on the connection that it has to be acknowledged on."""

    line: _Line
    epoch: int
    mid: int
    qos: int
    topic: str
    payload: bytes
    retained: bool
    received_ns: int


class _Line:
    """One connection to the broker, and which of its lives a message came in.

    The numbers of messages begin anew when a broker has forgotten the session: an acknowledgement must not go
    to a later life's message of the same number. What was not acknowledged comes again.
    """

    def __init__(self, inbox: queue.Queue[_Arrival], closing: threading.Event) -> None:
        self._inbox = inbox
        self._closing = closing
        self._lock = threading.Lock()
        self._epoch = 0
        self.up = False
        self.dropped = 0
        self.connection: Connection | None = None

    def on_link(self, up: bool) -> None:
        """The connection stands, or fell."""
        with self._lock:
            self.up = up
            self._epoch += 1

    def on_message(self, message: paho.MQTTMessage) -> None:
        """Puts it into the inbox; what nobody would send again is dropped when that is full."""
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "not UTF-8"
        arrival = _Arrival(
            self, self._epoch, message.mid, message.qos, topic, bytes(message.payload), message.retain,
            time.time_ns(),
        )  # fmt: skip
        while not self._closing.is_set():
            try:
                self._inbox.put(arrival, timeout=_POLL_S if message.qos else 0)
                return
            except queue.Full:  # noqa: PERF203
                if not message.qos:
                    self.dropped += 1
                    return

    def acknowledge(self, arrival: _Arrival) -> None:
        """Tells the broker that it may forget the message."""
        with self._lock:
            if arrival.qos and arrival.epoch == self._epoch and self.connection is not None:
                self.connection.client.ack(arrival.mid, arrival.qos)


class Receiver:
    """Records a fleet, from `start` to `close`.

    Two connections: one for states and events, which the broker keeps for a receiver that is away, and one
    for telemetry, whose flood must not fill the broker's queue for the events. Receivers that write into one
    store share the telemetry (a shared subscription named after the store) and each take all events, which
    are few: one that never comes back takes no event with it. A receiver that comes back has its old name,
    and so its old sessions.

    Args:
        settings: The broker.
        path: The database file.
        retention: What the store keeps.
        share: Receivers of one share get each telemetry message once between them; None: those of one store.
        lasting: The broker keeps messages while we are away.
        on_recorded: Gets what was new, after its commit, on the writer's thread.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        path: Path,
        *,
        retention: Retention | None = None,
        share: str | None = None,
        lasting: bool = True,
        on_recorded: Callable[[Sequence[Incoming]], None] | None = None,
    ) -> None:
        """Raises EdgellmError for a file that cannot be used."""
        self._path = path
        self._retention = retention
        self._on_recorded = on_recorded
        store = Store(path)
        store_id = store.id
        store.close()
        self._seat = _Seat(path)
        self._closing = threading.Event()
        self._inbox: queue.Queue[_Arrival] = queue.Queue(maxsize=4 * _RECEIVE_MAXIMUM)
        name = f"edgellm-fleet-{store_id}-{self._seat.number}"
        lasting_filters, shared_filters = _filters(settings.tenant, share or store_id)
        try:
            self._lines = [
                self._line(settings, name, lasting_filters, _EVENTS_EXPIRY_S if lasting else 0),
                self._line(settings, f"{name}-tele", shared_filters, _TELEMETRY_EXPIRY_S if lasting else 0),
            ]
        except EdgellmError:
            self._seat.close()
            raise
        self._writer = threading.Thread(target=self._write, name="fleet-writer", daemon=True)
        self.trouble = ""

    @property
    def connected(self) -> bool:
        """Whether both connections stand."""
        return all(line.up for line in self._lines)

    @property
    def dropped(self) -> int:
        """Messages of QoS 0 that came faster than the disk took them."""
        return sum(line.dropped for line in self._lines)

    def start(self) -> None:
        """Begins to receive; an absent broker is tried again until `close`."""
        self._writer.start()
        for line in self._lines:
            assert line.connection is not None  # noqa: S101 - made with the line
            line.connection.start()

    def wait_ready(self, deadline_s: float) -> None:
        """Returns once everything is subscribed; raises BrokerError."""
        until = time.monotonic() + deadline_s
        for line in self._lines:
            assert line.connection is not None  # noqa: S101 - made with the line
            line.connection.wait_ready(max(0.1, until - time.monotonic()))

    def close(self, deadline_s: float = 10.0) -> None:
        """Commits the batch at hand and disconnects; the rest comes again to the next receiver."""
        self._closing.set()
        if self._writer.is_alive():
            self._writer.join(deadline_s)
        for line in self._lines:
            if line.connection is not None:
                line.connection.close()
        self._seat.close()

    def _line(
        self, settings: BrokerSettings, name: str, filters: list[tuple[str, int]], expiry_s: int
    ) -> _Line:
        line = _Line(self._inbox, self._closing)
        line.connection = Connection(
            settings,
            name,
            filters,
            on_message=line.on_message,
            on_link=line.on_link,
            session_expiry_s=expiry_s,
            receive_maximum=_RECEIVE_MAXIMUM,
            manual_ack=True,
        )
        return line

    # On the writer's thread.

    def _write(self) -> None:
        store = Store(self._path, self._retention)
        prune_at = 0.0
        try:
            while not self._closing.is_set():
                batch = self._batch()
                if batch:
                    self._commit(store, batch)
                if time.monotonic() >= prune_at:
                    prune_at = time.monotonic() + self._prune(store)
        except Exception as error:
            # What was not acknowledged stays with the broker; who looks on must not take silence for calm.
            log.exception("fleet.recording_ended")
            self.trouble = f"the recording has ended: {type(error).__name__}; start it again"
        finally:
            store.close()

    def _batch(self) -> list[_Arrival]:
        """What has come within the batch's bounds; empty after a while of silence."""
        try:
            batch = [self._inbox.get(timeout=_POLL_S)]
        except queue.Empty:
            return []
        until = time.monotonic() + _BATCH_S
        with contextlib.suppress(queue.Empty):
            while len(batch) < _BATCH_MESSAGES:
                batch.append(self._inbox.get(timeout=max(0.0, until - time.monotonic())))
        return batch

    def _commit(self, store: Store, batch: list[_Arrival]) -> None:
        """Records a batch, then acknowledges it; a full disk is tried again until there is room."""
        messages, rejects = _checked(batch)
        fresh: list[Incoming] | None = None
        while fresh is None:
            try:
                fresh = store.record(messages, rejects)
                self.trouble = ""
            except sqlite3.Error as error:  # noqa: PERF203
                if not self.trouble:
                    log.error("fleet.not_recorded messages=%d error=%s", len(messages), error)
                self.trouble = f"{self._path} cannot be written: {error}"
                if self._closing.wait(_RETRY_S):
                    return
        for arrival in batch:
            arrival.line.acknowledge(arrival)
        if self._on_recorded is not None and fresh:
            try:
                self._on_recorded(fresh)
            except Exception:  # who looks on must not stop the recording
                log.exception("fleet.listener_failed")

    def _prune(self, store: Store) -> float:
        """Seconds until it is to be done again."""
        try:
            return _PRUNE_AGAIN_S if store.prune() else _PRUNE_EVERY_S
        except sqlite3.Error as error:
            log.warning("fleet.not_pruned error=%s", error)
            return _PRUNE_EVERY_S


def _filters(tenant: str, share: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Topic filters with their QoS, of what lasts and of telemetry; what is retained cannot be shared."""
    device = f"edgellm/v1/{tenant}/+/+"
    lasting = [(f"{device}/{rest}", 1) for rest in ("state", "reported", "desired", "evt/#")]
    return lasting, [(f"$share/{share}/{device}/tele/#", 1)]


def _checked(batch: Sequence[_Arrival]) -> tuple[list[Incoming], list[Reject]]:
    messages, rejects = [], []
    for arrival in batch:
        at_ns, payload = arrival.received_ns, arrival.payload
        try:
            messages.append(check(arrival.topic, payload, received_ns=at_ns, retained=arrival.retained))
        except RejectedError as error:
            rejects.append(Reject(at_ns, arrival.topic, error.reason, error.detail, payload))
    return messages, rejects


class _Seat:
    """A number that no other receiver of this file has, and that one which comes back finds free again."""

    def __init__(self, path: Path) -> None:
        for number in range(_MAX_SEATS):
            lock = os.open(path.with_name(f"{path.name}.receiver-{number}"), os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            self.number, self._lock = number, lock
            return
        raise EdgellmError(f"{_MAX_SEATS} receivers write to {path} already", "one or two are enough")

    def close(self) -> None:
        """Gives the number back: the kernel does it for one that is killed."""
        os.close(self._lock)
