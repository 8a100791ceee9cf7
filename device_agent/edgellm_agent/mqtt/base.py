"""What the rest of the agent may ask of the way to the broker, and what travels on it."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from edgellm.fleet.topics import DeviceTopics
from edgellm.v1 import fleet_pb2, telemetry_pb2


@dataclass(frozen=True)
class MessageProperties:
    """What came with a message; all but `retain` only with MQTT 5."""

    retain: bool
    content_type: str | None = None
    # Where the sender wants the answer, and what the answer must carry.
    response_topic: str | None = None
    correlation_data: bytes | None = None


OnMessage: TypeAlias = Callable[[str, bytes, MessageProperties], None]


class Uplink(Protocol):
    """The agent's side of the broker, which may be absent at any time; everything on the event loop."""

    @property
    def topics(self) -> DeviceTopics:
        """Names of this device's topics."""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us."""

    def new_event(self, kind: str) -> fleet_pb2.Event:
        """An envelope with the next id of its kind in this run, for example "reported"; its data is empty."""

    def publish_event(self, topic: str, event: fleet_pb2.Event, *, correlation_data: bytes = b"") -> None:
        """Send it at least once, with the same id each time: it survives outages and restarts.

        Raises ValueError for a payload above `MAX_PAYLOAD_BYTES`.
        """

    def publish_retained(self, topic: str, event: fleet_pb2.Event) -> None:
        """Make this the topic's value, now and at each new connection; only the last one counts.

        It does not survive a restart of the agent: whoever owns the value gives it again.
        Raises ValueError for a payload above `MAX_PAYLOAD_BYTES`.
        """

    def on_message(self, topic_filter: str, callback: OnMessage) -> None:
        """Subscribe, now and at each new connection; `callback(topic, payload, properties)` must not block.

        A retained message comes again with each connection.
        """


class Records(Protocol):
    """Where the telemetry comes from: the sampler."""

    def records(self, interval_s: float = 0.0) -> AsyncIterator[telemetry_pb2.Telemetry]:
        """Give the latest record about every `interval_s`; none changes a record."""


# The smallest bound of the large brokers' services; nothing of ours comes near it.
MAX_PAYLOAD_BYTES = 128 << 10


@dataclass(frozen=True)
class Publication:
    """One message as it goes out."""

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = False
    # How long a broker keeps it for a reader that is away, seconds; None: as long as it likes.
    expiry_s: int | None = None
    correlation_data: bytes = b""


class Answer(enum.Enum):
    """What a broker said to a message of QoS 1; one of QoS 0 that is on its way counts as taken."""

    TAKEN = enum.auto()
    # Nobody is subscribed to its topic; only MQTT 5 tells.
    UNHEARD = enum.auto()
    REFUSED = enum.auto()


# Told once; never if the connection is lost before.
Done: TypeAlias = Callable[[Answer], None]
