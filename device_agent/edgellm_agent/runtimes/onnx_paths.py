"""Reads an ONNX graph before the runtime does, and refuses what could lead out of the engine's folder.

A graph names the files of its weights, and the runtime opens them: any path, any offset. It may also hold
functions, subgraphs and operators of all kinds, some of which read files of their own (`EPContext`). The
build host writes few of these, so all else is refused: fields that are not in the tables below, operators
that are not in the list.

The format is protobuf (https://protobuf.dev/programming-guides/encoding/), the numbers are those of
onnx.proto (ONNX 1.18). Read here by hand: the device has no `onnx` package, and this parser never goes deeper
than five messages.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from edgellm_agent.runtimes.base import EngineLoadError

# Weights lie outside: the graph of a model of 30 layers has 150 kB.
MAX_GRAPH_BYTES = 64 << 20
# Of all messages; a model of 100 layers has 40,000. A million take a second.
MAX_FIELDS = 1_000_000

# What edgellm_buildhost/graph/onnxruntime.py writes.
OPERATORS = frozenset({
    ("", "Add"),
    ("", "Concat"),
    ("", "Gather"),
    ("", "Gelu"),
    ("", "GreaterOrEqual"),
    ("", "MatMul"),
    ("", "Mul"),
    ("", "QuantizeLinear"),
    ("", "Range"),
    ("", "ReduceMax"),
    ("", "Reshape"),
    ("", "SimplifiedLayerNormalization"),
    ("", "Split"),
    ("", "Sub"),
    ("", "Tanh"),
    ("", "Unsqueeze"),
    ("", "Where"),
    ("com.microsoft", "GatherBlockQuantized"),
    ("com.microsoft", "GroupQueryAttention"),
    ("com.microsoft", "MatMulIntegerToFloat"),
    ("com.microsoft", "MatMulNBits"),
    ("com.microsoft", "QuickGelu"),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"),
})  # fmt: skip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LEAF = ""
# By message: its fields that may be there, and the message that each holds, or none. Not there: functions and
# training of a model; sparse initializers of a graph; graphs, tensors and types of an attribute.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {**dict.fromkeys((1, 2, 3, 4, 5, 6, 8), _LEAF), 7: "graph"},
    "graph": {**dict.fromkeys((2, 10, 11, 12, 13), _LEAF), 1: "node", 5: "tensor"},
    "node": {**dict.fromkeys((1, 2, 3, 4, 6, 7), _LEAF), 5: "attribute"},
    "attribute": dict.fromkeys((1, 2, 3, 4, 7, 8, 9, 13, 20), _LEAF),
    "tensor": {**dict.fromkeys((1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14), _LEAF), 13: "entry"},
    "entry": dict.fromkeys((1, 2), _LEAF),
}
_OP_TYPE, _DOMAIN = 4, 7
_KEY, _VALUE = 1, 2
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER = re.compile(r"[0-9]{1,15}")


@dataclass
class _Message:
    """A message under way: where it ends, and those of its texts that count."""

    kind: str
    end: int
    texts: dict[int, bytes] = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)
    """Of a tensor: what it says of its external data."""


def check_graph(path: Path) -> None:
    """Refuses a graph that names files outside of its folder, or what is not needed.

    Raises EngineLoadError.
    """
    try:
        size = _regular_bytes(path)
        if size > MAX_GRAPH_BYTES:
            _refuse(path, f"it has {size:,} bytes, more than {MAX_GRAPH_BYTES:,}")
        data = path.read_bytes()
        for message in _messages(data):
            if message.kind == "node":
                _check_operator(message)
            elif message.kind == "tensor" and message.entries:
                _check_location(path.parent, message.entries)
    except (OSError, ValueError) as error:
        _refuse(path, str(error))


def _messages(data: bytes) -> Iterator[_Message]:
    """Every message of a model as it ends, inner ones first; raises ValueError."""
    open_ = [_Message("model", len(data))]
    at = count = 0
    while open_:
        message = open_[-1]
        if at == message.end:
            open_.pop()
            if message.kind == "entry":
                _add_entry(open_[-1], message)
            yield message
            continue
        count += 1
        if count > MAX_FIELDS:
            raise ValueError(f"it has more than {MAX_FIELDS:,} fields")
        tag, at = _varint(data, at, message.end)
        begin, at = _extent(data, at, message.end, tag & 7)
        number, inner = tag >> 3, _FIELDS[message.kind].get(tag >> 3)
        if inner is None:
            raise ValueError(f"field {number} of a {message.kind} is not allowed here")
        if inner:
            if tag & 7 != _BYTES:
                raise ValueError(f"field {number} of a {message.kind} is no message")
            open_.append(_Message(inner, at))
            at = begin
        elif tag & 7 == _BYTES and message.kind in {"node", "entry"}:
            message.texts[number] = data[begin:at]


def _extent(data: bytes, at: int, end: int, wire_type: int) -> tuple[int, int]:
    """Where a field's content begins and ends."""
    if wire_type == _VARINT:
        begin, (_, at) = at, _varint(data, at, end)
    elif wire_type == _BYTES:
        length, begin = _varint(data, at, end)
        at = begin + length
    elif wire_type in {_FIXED32, _FIXED64}:
        begin, at = at, at + (4 if wire_type == _FIXED32 else 8)
    else:
        raise ValueError(f"it has a field of the wire type {wire_type}")
    if at > end:
        raise ValueError("a field is longer than what it is in")
    return begin, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """An unsigned number of 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise ValueError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than 10 bytes")


def _add_entry(tensor: _Message, entry: _Message) -> None:
    key, value = (entry.texts.get(number, b"").decode("utf-8") for number in (_KEY, _VALUE))
    if key not in {"location", "offset", "length"} or key in tensor.entries:
        raise ValueError(f"external data has {key!r:.40} twice, or where it has no meaning")
    tensor.entries[key] = value


def _check_operator(node: _Message) -> None:
    domain, kind = (node.texts.get(number, b"").decode("utf-8") for number in (_DOMAIN, _OP_TYPE))
    if (domain, kind) not in OPERATORS:
        raise ValueError(f"the operator {domain or 'ai.onnx'}.{kind:.60} is not one that edgellm builds")


def _check_location(folder: Path, entries: dict[str, str]) -> None:
    """External data must lie within a plain file of the folder."""
    title = entries.get("location", "")
    if not _TITLE.fullmatch(title):
        raise ValueError(f"a tensor lies in {title!r:.100}, which is not the name of a file of the engine")
    size = _regular_bytes(folder / title)
    offset, length = _number(entries.get("offset", "0")), _number(entries.get("length", "0"))
    if offset + length > size:
        raise ValueError(
            f"a tensor lies at {offset:,} to {offset + length:,} of {title}, which has {size:,} bytes"
        )


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r:.40} is not an offset or a length")
    return int(text)


def _regular_bytes(path: Path) -> int:
    """Size of a file that is one: no link leads elsewhere, no pipe waits for a writer."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise ValueError(f"the engine has no file {path.name}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a plain file")
    return status.st_size


def _refuse(path: Path, why: str) -> NoReturn:
    raise EngineLoadError(f"the bundle's graph {path.name} was refused: {why}")
