"""Makes inputs of valid ones: changed bytes, changed JSON trees, changed protobuf messages."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]

_NUMBERS = (0, 1, -1, 2, 127, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40)
_FLOATS = (0.0, -0.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 0.5)
_TEXTS = (
    "",
    " ",
    "\0",
    "a" * 300,
    "é" * 9,
    "\ud7ff\ue000",
    "\u202e",
    "..",
    "/",
    "../../etc/passwd",
    "/etc/shadow",
    "%s%n",
    "{{7*7}}",
    "sha256:" + "0" * 64,
    "sha256:" + "A" * 64,
    "sha256:",
    "127.0.0.1",
    "a/b",
    "-",
    "1e999",
    "\n",
    "\r\n",
    "null",
    "💥",
)
_VALUES: tuple[Any, ...] = (None, True, False, [], {}, *_NUMBERS, 0.5, -1e308, *_TEXTS)


def changed_bytes(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the corpus with a few pieces changed, cut, repeated, or taken from another one."""
    data = bytearray(rng.choice(corpus))
    for _ in range(1 << rng.randrange(4)):
        _change(rng, data, corpus)
    return bytes(data)


def _change(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + (1 << rng.randrange(8)))
    match rng.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = rng.randbytes(1 + rng.randrange(8))
        case 4:
            data[at:at] = data[at:end] * rng.randrange(1, 5)
        case 5:
            other = rng.choice(corpus)
            begin = rng.randrange(len(other) + 1)
            data[at:end] = other[begin : begin + (end - at)]
        case 6:
            data[at:end] = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")


def changed_json(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the corpus with some values replaced, moved, repeated or nested; now and then no JSON."""
    if rng.random() < 0.25:
        return changed_bytes(rng, corpus)
    tree = json.loads(rng.choice(corpus))
    for _ in range(1 << rng.randrange(3)):
        tree = changed_tree(rng, tree)
    return json.dumps(tree).encode()


def changed_tree(rng: random.Random, tree: Any) -> Any:
    """The tree with one place changed."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return rng.choice(_VALUES)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = rng.choice(_VALUES)
        case 3:
            del holder[key]
        case 4:
            other, its_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[its_key]) if its_key in _keys(other) else None
        case 5 if isinstance(holder, dict):
            holder[rng.choice(_TEXTS)] = rng.choice(_VALUES)
        case 6:
            for _ in range(rng.choice((1, 10, 60))):
                holder[key] = [holder[key]]
        case _ if isinstance(holder, list):
            holder.extend(holder * rng.randrange(1, 20))
        case _ if isinstance(holder[key], str):
            holder[key] = changed_bytes(rng, [holder[key].encode()]).decode(errors="replace")
        case _ if isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 1 << 32))
    return tree


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(tree: Any) -> Any:
    if isinstance(tree, (dict, list)):
        for key in list(_keys(tree)):
            yield tree, key
            yield from _places(tree[key])


def changed_message(kind: type[Message]) -> Mutator:
    """A mutator of serialized messages of one type: fields set, cleared and repeated, or bytes changed."""

    def mutate(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return changed_bytes(rng, corpus)
        message = kind.FromString(rng.choice(corpus))
        for _ in range(1 << rng.randrange(4)):
            _change_field(rng, message, depth=4)
        return message.SerializeToString()

    return mutate


def _change_field(rng: random.Random, message: Message, depth: int) -> None:
    if not message.DESCRIPTOR.fields or not depth:
        return
    field = rng.choice(message.DESCRIPTOR.fields)
    if rng.random() < 0.1:
        message.ClearField(field.name)
        return
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type is None:
            entry = field.message_type.fields_by_name
            value[_scalar(rng, entry["key"])] = _scalar(rng, entry["value"])
    elif hasattr(value, "add"):
        _change_field(rng, value.add(), depth - 1)
    elif field.message_type is not None:
        value.SetInParent()
        _change_field(rng, value, depth - 1)
    elif hasattr(value, "append"):
        value.extend(_scalar(rng, field) for _ in range(rng.choice((1, 2, 100))))
    else:
        setattr(message, field.name, _scalar(rng, field))


def _scalar(rng: random.Random, field: FieldDescriptor) -> Any:
    bits = {
        FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31),
        FieldDescriptor.CPPTYPE_UINT32: (0, 2**32),
        FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63),
        FieldDescriptor.CPPTYPE_UINT64: (0, 2**64),
        FieldDescriptor.CPPTYPE_ENUM: (0, 2**31),
    }
    kind = field.cpp_type
    if kind in bits:
        low, high = bits[kind]
        return rng.choice([n for n in _NUMBERS if low <= n < high] + [rng.randrange(10)])
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}:
        return rng.choice((*_FLOATS, rng.uniform(-3, 3)))
    text = rng.choice(_TEXTS)
    return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
