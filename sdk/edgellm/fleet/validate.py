"""Decides whether a message is what its topic says; what is not is rejected with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from edgellm.fleet.topics import EVENTS, TELEMETRY, DeviceTopics, decode
from edgellm.v1 import fleet_pb2

# Far above any record or event; what is larger is not parsed.
MAX_PAYLOAD_BYTES = 64 * 1024
_MAX_ID = 128
# Of counters: what SQLite's integers hold.
_MAX_COUNT = 2**63 - 1
# Of times: what 64 bits of nanoseconds hold (the year 2262). A board without a battery begins in 1970,
# which is wrong but no reason to lose what it says.
_MAX_SECONDS = _MAX_COUNT // 10**9

# By the rest of the topic: name of the part, and field of `Event.data`.
_PARTS: dict[str, tuple[str, str]] = {
    **{name: (name, name) for name in ("state", "desired", "reported")},
    **{f"tele/{name}": (name, "telemetry") for name in TELEMETRY},
    **{f"evt/{leaf}": (kind, kind) for kind, leaf in EVENTS.items()},
}


@dataclass(frozen=True)
class Incoming:
    """A message that is what its topic says.

    `event` is None where a retained message was cleared.
    """

    topics: DeviceTopics
    # "state", "desired", "reported", one of `TELEMETRY` or one of `EVENTS`.
    part: str
    event: fleet_pb2.Event | None
    # Clock of the receiver, nanoseconds since 1970.
    received_ns: int
    # The broker had kept it: it is older than its arrival.
    retained: bool

    @property
    def time_ns(self) -> int | None:
        """The sender's clock, which may be wrong; None where it said none, as in a will."""
        if self.event is None or not self.event.HasField("time"):
            return None
        return self.event.time.seconds * 10**9 + self.event.time.nanos


class RejectedError(Exception):
    """A message that is not what its topic says; the reason is one of few, so that they can be counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def check(topic: str, payload: bytes, *, received_ns: int, retained: bool) -> Incoming:
    """The event of a message; raises RejectedError."""
    topics, part, field = _address(topic)
    if not payload:
        if part not in {"state", "desired", "reported"}:
            raise RejectedError("empty")
        return Incoming(topics, part, None, received_ns, retained)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RejectedError("too large", f"{len(payload)} bytes")
    try:
        event = decode(payload)
    except ValueError as error:
        raise RejectedError("not an event", str(error)) from None
    _check_identity(event, topics, part, field)
    _check_figures(event)
    return Incoming(topics, part, event, received_ns, retained)


def _address(topic: str) -> tuple[DeviceTopics, str, str]:
    try:
        topics, rest = DeviceTopics.parse(topic)
        return topics, *_PARTS[rest]
    except (ValueError, KeyError):
        raise RejectedError("unknown topic", topic[:200]) from None


def _check_identity(event: fleet_pb2.Event, topics: DeviceTopics, part: str, field: str) -> None:
    source = f"edgellm/{topics.tenant}/fleet" if part == "desired" else topics.source
    if event.source != source:
        raise RejectedError("wrong source", f"{event.source!r:.200} on the topic of {topics.source}")
    kind = f"telemetry.{part}" if field == "telemetry" else field
    if event.type != f"edgellm.{kind}.v1" or event.WhichOneof("data") != field:
        raise RejectedError("wrong type", f"{event.type!r:.100} with {event.WhichOneof('data')}, not {kind}")
    if not 0 < len(event.id) <= _MAX_ID or not event.id.isprintable():
        raise RejectedError("no id", f"{event.id!r:.200}")


def _check_figures(event: fleet_pb2.Event) -> None:
    numbers = [event.run, event.sequence, event.state.session, event.desired.generation]
    if max(numbers) > _MAX_COUNT:
        raise RejectedError("impossible number", str(max(numbers)))
    seconds, nanos = event.time.seconds, event.time.nanos
    if not (0 <= seconds < _MAX_SECONDS and 0 <= nanos < 10**9):
        raise RejectedError("impossible time", f"{seconds} s, {nanos} ns")
    data = getattr(event, event.WhichOneof("data") or "")
    if not _is_finite(data):
        raise RejectedError("impossible number", "not finite")


def _is_finite(message: Message) -> bool:
    """Whether every floating-point field is a number."""
    for field, value in message.ListFields():
        if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE and not math.isfinite(value):
            return False
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            items = (value,) if isinstance(value, Message) else value
            if not all(_is_finite(item) for item in items):
                return False
    return True
