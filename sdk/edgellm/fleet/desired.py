"""Sets what devices are to run, and follows them until they do.

A rollout in waves would cut the list that `plan` gives into several and publish one after the other.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import paho.mqtt.client as paho

from edgellm.bundle.digest import is_digest
from edgellm.errors import EdgellmError
from edgellm.fleet.connection import BrokerError, Connection
from edgellm.fleet.settings import BrokerSettings
from edgellm.fleet.topics import CONTENT_TYPES, DeviceTopics, encode
from edgellm.fleet.validate import RejectedError, check
from edgellm.v1 import fleet_pb2

if TYPE_CHECKING:
    from typing_extensions import Self

# Nothing says that a topic has no retained message; so long nothing comes, there is none.
_QUIET_S = 0.7
_FAILED = {"FAILED", "REFUSED", "PINNED", "OVERRIDDEN"}


@dataclass
class Twin:
    """What the broker keeps about one device."""

    topics: DeviceTopics
    state: fleet_pb2.DeviceState = field(default_factory=fleet_pb2.DeviceState)
    reported: fleet_pb2.Reported = field(default_factory=fleet_pb2.Reported)
    desired: fleet_pb2.Desired = field(default_factory=fleet_pb2.Desired)

    @property
    def next_generation(self) -> int:
        """Above all that the device may have seen."""
        return max(self.desired.generation, self.reported.observed_generation) + 1


@dataclass(frozen=True)
class Assignment:
    """An engine for one device."""

    topics: DeviceTopics
    desired: fleet_pb2.Desired


@dataclass(frozen=True)
class Progress:
    """How far a device is with an assignment."""

    topics: DeviceTopics
    # A phase of `Reported`, or "WAITING" (has not seen it yet), "OFFLINE", "REPLACED" (by another operator).
    phase: str
    detail: str = ""
    fetched_bytes: int = 0
    total_bytes: int = 0

    @property
    def ok(self) -> bool:
        """The device runs it."""
        return self.phase == "CONVERGED"

    @property
    def over(self) -> bool:
        """Nothing more will come of it."""
        return self.ok or self.phase in _FAILED or self.phase == "REPLACED"


def plan(twins: Sequence[Twin], engine_for: Callable[[Twin], str], source: str) -> list[Assignment]:
    """An assignment for each device, with a generation above all that it has seen.

    Raises EdgellmError for an engine that is no digest, or a source that no device could fetch from.
    """
    if source:
        url = urlsplit(source)
        if url.scheme not in {"https", "http", "oci", "oci+http"} or not url.netloc:
            raise EdgellmError(
                f"--source {source!r:.100} is nothing that a device can fetch from",
                "write https://HOST/PATH (an OCI layout) or oci://HOST/REPOSITORY",
            )
    assignments = []
    for twin in twins:
        engine = engine_for(twin)
        if not is_digest(engine):
            raise EdgellmError(
                f"not the digest of an engine: {engine!r:.100}",
                "write sha256: and 64 lower-case hexadecimal digits, or name a bundle's directory",
            )
        desired = fleet_pb2.Desired(generation=twin.next_generation, engine=engine, source=source)
        assignments.append(Assignment(twin.topics, desired))
    return assignments


class Controller:
    """Knows the twins of a tenant's devices as the broker has them, and sets `desired`."""

    def __init__(self, settings: BrokerSettings) -> None:
        """Raises EdgellmError for a TLS or password file that cannot be used."""
        self._tenant = settings.tenant
        self._twins: dict[str, Twin] = {}
        self._changed = threading.Condition()
        self._changed_s = time.monotonic()
        base = f"edgellm/v1/{settings.tenant}/+/+"
        self._connection = Connection(
            settings,
            f"edgellm-set-{uuid.uuid4().hex[:12]}",
            [(f"{base}/{part}", 1) for part in ("state", "reported", "desired")],
            on_message=self._on_message,
        )

    def twins(self, deadline_s: float = 10.0) -> list[Twin]:
        """What the broker keeps, by source: connects, and reads until nothing more comes.

        Raises BrokerError if the broker cannot be used.
        """
        until = time.monotonic() + deadline_s
        self._connection.wait_ready(deadline_s)
        with self._changed:
            self._changed_s = time.monotonic()
            while (quiet_s := self._changed_s + _QUIET_S - time.monotonic()) > 0:
                if time.monotonic() >= until:
                    raise BrokerError(
                        f"what the broker keeps did not end within {deadline_s:g} s",
                        "give it longer with --timeout",
                    )
                self._changed.wait(quiet_s)
            return [self._twins[source] for source in sorted(self._twins)]

    def publish(self, assignments: Sequence[Assignment], deadline_s: float = 10.0) -> None:
        """Gives the assignments to the broker, which keeps them for devices that are away.

        Raises BrokerError with the devices whose assignment the broker did not take.
        """
        until = time.monotonic() + deadline_s
        with self._acknowledged() as refused:
            sent = []
            for item in assignments:
                event = _event(self._tenant, item)
                payload = encode(event, "json")
                message = self._connection.publish(
                    item.topics.desired, payload, content_type=CONTENT_TYPES["json"]
                )
                sent.append((item, message))
            missed = {}
            for item, message in sent:
                try:
                    message.wait_for_publish(max(0.01, until - time.monotonic()))
                except (ValueError, RuntimeError) as error:
                    missed[item.topics.device] = str(error)
                if not _is_published(message):
                    missed.setdefault(item.topics.device, "no answer")
                elif message.mid in refused:
                    missed[item.topics.device] = refused[message.mid]
        if missed:
            which = "; ".join(f"{device}: {why}" for device, why in sorted(missed.items()))
            raise BrokerError(
                f"not taken by the broker: {which}", "check what the broker lets this user write"
            )

    def follow(self, assignments: Sequence[Assignment], deadline_s: float) -> Iterator[list[Progress]]:
        """The devices' progress whenever it changes, at last when all are done or the deadline is over."""
        until = time.monotonic() + deadline_s
        shown: list[Progress] | None = None
        while True:
            with self._changed:
                progress = [self._progress(item) for item in assignments]
                left_s = until - time.monotonic()
                if progress == shown and left_s > 0:
                    self._changed.wait(left_s)
                    continue
            yield progress
            shown = progress
            if left_s <= 0 or all(item.over for item in progress):
                return

    def __enter__(self) -> Self:
        """Begins to connect."""
        self._connection.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnects."""
        self._connection.close()

    @contextmanager
    def _acknowledged(self) -> Iterator[dict[int, str]]:
        """The refusals of the broker by message number, as they come."""
        refused: dict[int, str] = {}

        def on_publish(_client: object, _data: object, mid: int, reason: object, _properties: object) -> None:
            if getattr(reason, "is_failure", False):
                refused[mid] = str(reason)

        self._connection.client.on_publish = on_publish
        try:
            yield refused
        finally:
            self._connection.client.on_publish = None

    def _progress(self, item: Assignment) -> Progress:
        twin = self._twins.get(item.topics.source, Twin(item.topics))
        report, generation = twin.reported, item.desired.generation
        wish = twin.desired
        if report.observed_generation > generation or (
            report.observed_generation == generation and report.desired_engine != item.desired.engine
        ):
            seen = f"generation {report.observed_generation}, {report.desired_engine}"
            return Progress(item.topics, "REPLACED", f"the device follows another operator's {seen}")
        if report.observed_generation == generation and report.phase not in {"", "NONE"}:
            return Progress(item.topics, report.phase, _why(report), report.fetched_bytes, report.total_bytes)
        # Of two wishes of one generation the device follows the one that reaches it first, which need not
        # be the one that the broker keeps: only its report tells.
        if wish.generation > generation:
            seen = f"generation {wish.generation}, {wish.engine}"
            return Progress(item.topics, "REPLACED", f"another operator set {seen}")
        return Progress(item.topics, "WAITING" if twin.state.online else "OFFLINE")

    # On paho's thread.

    def _on_message(self, message: paho.MQTTMessage) -> None:
        try:
            incoming = check(
                message.topic, bytes(message.payload), received_ns=time.time_ns(), retained=message.retain
            )
        except (RejectedError, UnicodeDecodeError):
            return
        with self._changed:
            twin = self._twins.setdefault(incoming.topics.source, Twin(incoming.topics))
            event = incoming.event or fleet_pb2.Event()
            if incoming.part == "state":
                twin.state = event.state
            elif incoming.part == "reported":
                twin.reported = event.reported
            else:
                twin.desired = event.desired
            self._changed_s = time.monotonic()
            self._changed.notify_all()


def _event(tenant: str, item: Assignment) -> fleet_pb2.Event:
    event = fleet_pb2.Event(
        # Two operators may choose one generation at once: the id must tell their wishes apart.
        id=f"desired-{item.desired.generation}-{uuid.uuid4().hex[:12]}",
        source=f"edgellm/{tenant}/fleet",
        type="edgellm.desired.v1",
        desired=item.desired,
    )
    event.time.FromNanoseconds(time.time_ns())
    return event


def _is_published(message: paho.MQTTMessageInfo) -> bool:
    try:
        return message.is_published()
    except (ValueError, RuntimeError):
        return False


def _why(report: fleet_pb2.Reported) -> str:
    if report.error:
        return report.error
    if report.phase == "PINNED":
        return "the device's engine is pinned: `edgellm engine unpin` lets it follow"
    if report.phase == "OVERRIDDEN":
        return "another engine was activated on the device itself"
    return ""


def percent(progress: Progress) -> int | None:
    """How much has been fetched; None where the size is unknown."""
    if progress.total_bytes <= 0:
        return None
    return min(100, math.floor(100 * progress.fetched_bytes / progress.total_bytes))
