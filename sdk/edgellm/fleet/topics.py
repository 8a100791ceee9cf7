"""Names of MQTT topics and the events that travel on them, to bytes and back; knows no MQTT client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from edgellm.json_form import to_fields
from edgellm.v1 import fleet_pb2, telemetry_pb2

Encoding: TypeAlias = Literal["json", "protobuf"]
CONTENT_TYPES: dict[Encoding, str] = {
    "json": "application/json",
    "protobuf": "application/protobuf; proto=edgellm.v1.Event",
}
# Wildcards, slashes and "$" would change which topic is meant.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# The parts of a record that each telemetry topic carries.
TELEMETRY: dict[str, tuple[str, ...]] = {
    "thermal": ("thermal",),
    "power": ("power",),
    "runtime": ("runtime", "compute", "memory", "governor", "uplink"),
}
# The leaf below `evt/` for each kind of event.
EVENTS: dict[str, str] = {"governor": "throttle", "engine": "deploy", "worker": "worker"}
_ROOT = "edgellm/v1"


@dataclass(frozen=True)
class DeviceTopics:
    """The topics of one device."""

    tenant: str
    group: str
    device: str

    def __post_init__(self) -> None:
        """Raise ValueError for a name that cannot be one level of a topic."""
        for name in (self.tenant, self.group, self.device):
            if not re.fullmatch(NAME_PATTERN, name):
                raise ValueError(
                    f"{name!r} cannot be part of a topic: letters, digits, '.', '_', '-', at most 64"
                )

    @property
    def source(self) -> str:
        """The `source` of the device's events."""
        return f"edgellm/{self.tenant}/{self.group}/{self.device}"

    @property
    def base(self) -> str:
        """What all topics of the device begin with."""
        return f"{_ROOT}/{self.tenant}/{self.group}/{self.device}"

    @property
    def state(self) -> str:
        """Birth and will, retained."""
        return f"{self.base}/state"

    @property
    def desired(self) -> str:
        """What the fleet wants the device to run, retained."""
        return f"{self.base}/desired"

    @property
    def reported(self) -> str:
        """What the device runs, retained."""
        return f"{self.base}/reported"

    @property
    def command_request(self) -> str:
        """Commands to the device."""
        return f"{self.base}/cmd/req"

    @property
    def command_response(self) -> str:
        """What came of them."""
        return f"{self.base}/cmd/resp"

    def telemetry(self, name: str) -> str:
        """One of `TELEMETRY`."""
        return f"{self.base}/tele/{name}"

    def event(self, kind: str) -> str:
        """For one of `EVENTS`."""
        return f"{self.base}/evt/{EVENTS[kind]}"

    @classmethod
    def parse(cls, topic: str) -> tuple[DeviceTopics, str]:
        """The device of a topic, and the rest of it, for example "tele/thermal"; raises ValueError."""
        words = topic.split("/")
        if len(words) < 6 or "/".join(words[:2]) != _ROOT:
            raise ValueError(f"{topic!r} is no topic of a device")
        return cls(*words[2:5]), "/".join(words[5:])


def envelope(
    topics: DeviceTopics, kind: str, run: int, sequence: int, time_ns: int | None
) -> fleet_pb2.Event:
    """An event without its data: `kind` is a type between "edgellm." and ".v1"; a will knows no time."""
    event = fleet_pb2.Event(
        id=f"{run}-{kind}-{sequence}",
        source=topics.source,
        type=f"edgellm.{kind}.v1",
        run=run,
        sequence=sequence,
    )
    if time_ns is not None:
        event.time.FromNanoseconds(time_ns)
    return event


def telemetry_events(
    topics: DeviceTopics,
    run: int,
    record: telemetry_pb2.Telemetry,
    names: Iterable[str] = tuple(TELEMETRY),
) -> Iterator[tuple[str, fleet_pb2.Event]]:
    """Give name and event for each of these `TELEMETRY` topics that the record has something for."""
    for name in names:
        present = [field for field in TELEMETRY[name] if record.HasField(field)]  # type: ignore[arg-type]
        if not present:
            continue
        event = envelope(topics, f"telemetry.{name}", run, record.sequence, record.time.ToNanoseconds())
        event.telemetry.sequence = record.sequence
        event.telemetry.time.CopyFrom(record.time)
        event.telemetry.monotonic_ns = record.monotonic_ns
        for field in present:
            getattr(event.telemetry, field).CopyFrom(getattr(record, field))
        yield name, event


def state_event(
    topics: DeviceTopics, state: fleet_pb2.DeviceState, *, run: int, revision: int, time_ns: int | None
) -> fleet_pb2.Event:
    """Give the event that tells a device's state; a will cannot know its hour: `time_ns` None."""
    event = envelope(topics, "state", run, revision, time_ns)
    event.id = f"{state.session}-state-{revision}"
    event.state.CopyFrom(state)
    return event


def encode(event: fleet_pb2.Event, encoding: Encoding) -> bytes:
    """Give the payload; the same event gives the same bytes."""
    if encoding == "protobuf":
        return event.SerializeToString(deterministic=True)
    return json.dumps(to_fields(event), separators=(",", ":"), ensure_ascii=False).encode()


def decode(payload: bytes) -> fleet_pb2.Event:
    """Give the event of a payload in either encoding; raises ValueError if it is neither.

    MQTT 3.1.1 has no content type, but no binary event begins with a brace: that would be field 15.
    """
    event = fleet_pb2.Event()
    try:
        if payload[:1] == b"{":
            json_format.Parse(payload, event, ignore_unknown_fields=True)
        else:
            event.ParseFromString(payload)
    except (json_format.ParseError, DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not an edgellm.v1.Event: {error}") from error
    return event
