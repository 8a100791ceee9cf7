"""Rounds a record to what its sensors can tell, so that 47.199999999999996 is not what travels."""

from __future__ import annotations

import functools

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

# By the end of a field's name, which is its unit; the first that fits.
_DECIMALS = {
    "celsius_per_s": 4,
    "tokens_per_s": 2,
    "tokens_per_joule": 4,
    "joules_per_request": 2,
    "celsius": 2,
    "percent": 2,
    "_mw": 1,
    "_mv": 1,
    "_ma": 1,
    "_mhz": 1,
    "_j": 1,
    "_s": 6,
    "pace": 3,
}


def round_floats(message: Message) -> None:
    """Rounds every float in a message of telemetry, in place."""
    for field, value in message.ListFields():
        decimals = _decimals(field)
        if decimals is not None:
            setattr(message, field.name, round(value, decimals))
        elif field.message_type is None or not _has_floats(field.message_type):
            continue
        elif isinstance(value, Message):
            round_floats(value)
        else:
            for item in value:
                round_floats(item)


@functools.cache
def _decimals(field: FieldDescriptor) -> int | None:
    """How many decimals a field gets; None if it is no float."""
    if field.cpp_type != FieldDescriptor.CPPTYPE_DOUBLE:
        return None
    return next(decimals for unit, decimals in _DECIMALS.items() if field.name.endswith(unit))


@functools.cache
def _has_floats(kind: Descriptor) -> bool:
    return any(
        _decimals(field) is not None or (field.message_type is not None and _has_floats(field.message_type))
        for field in kind.fields
    )
