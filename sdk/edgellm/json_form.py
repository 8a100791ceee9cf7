"""Messages as protobuf-JSON, in one way for all that writes it: MQTT, the CLI."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message


def to_fields(message: Message) -> dict[str, Any]:
    """The message under the contract's names: a known zero is shown, an absent field is not."""
    # Imported here: `edgellm --help` is quick.
    from google.protobuf import json_format  # noqa: PLC0415

    options: dict[str, Any] = {"preserving_proto_field_name": True, _show_zeros(): True}
    return json_format.MessageToDict(message, **options)


@functools.cache
def _show_zeros() -> str:
    """The option's name: it was renamed in protobuf 5.26."""
    import inspect  # noqa: PLC0415

    from google.protobuf import json_format  # noqa: PLC0415

    known = inspect.signature(json_format.MessageToDict).parameters
    names = ("always_print_fields_with_no_presence", "including_default_value_fields")
    return next(name for name in names if name in known)
