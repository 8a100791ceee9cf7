"""Telemetry records as full as they can be."""

from __future__ import annotations

from itertools import count

from google.protobuf.message import Message

from edgellm.v1 import telemetry_pb2
from edgellm_agent.engine.figures import Totals


def full_record() -> telemetry_pb2.Telemetry:
    """A record whose every field has a figure of its own; those of messages in lists too."""
    counter = count(1)

    def fill(message: Message) -> None:
        for field in message.DESCRIPTOR.fields:
            repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
            if field.message_type:
                inner = getattr(message, field.name)
                fill(inner.add() if repeated else inner)
            elif repeated:
                getattr(message, field.name).append(field.name)
            elif field.type == field.TYPE_STRING:
                setattr(message, field.name, f"{field.name}-{next(counter)}")
            else:
                setattr(message, field.name, next(counter))

    record = telemetry_pb2.Telemetry()
    fill(record)
    record.runtime.state = "serving"
    record.governor.state = "HOT"
    record.governor.reasons[:] = ["over_current", "temperature"]
    return record


def busy_totals() -> Totals:
    """Of one answer of ten tokens."""
    totals = Totals()
    totals.first_token.observe(0.3)
    totals.inter_token.observe(0.02, 9)
    return totals
