"""Frames between agent and worker: a 4-byte big-endian length, then one protobuf message.

Both ends are ours and of one version; the length is bounded all the same, so that a broken peer cannot make
the other take memory without end.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError

from edgellm.v1 import worker_pb2

_Message = TypeVar("_Message", worker_pb2.ToWorker, worker_pb2.FromWorker)

MAX_FRAME_BYTES = 16 << 20
_LENGTH = struct.Struct(">I")


class FrameError(Exception):
    """The peer sent what is not a frame."""


def encode(message: worker_pb2.ToWorker | worker_pb2.FromWorker) -> bytes:
    """One frame. Raises FrameError if the message is larger than a frame may be."""
    payload = message.SerializeToString()
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(payload)} bytes is larger than a frame may be")
    return _LENGTH.pack(len(payload)) + payload


class WorkerChannel:
    """The worker's end: blocking, and polled between steps."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def send(self, message: worker_pb2.FromWorker) -> None:
        """Sends one message; raises OSError when the agent is gone."""
        self._socket.sendall(encode(message))

    def receive(self, timeout_s: float | None, wake_fd: int | None = None) -> list[worker_pb2.ToWorker]:
        """Messages that are there, after waiting for the first one at most so long (None: until one comes).

        Also returns when `wake_fd` is readable. Raises FrameError, or EOFError when the agent is gone.
        """
        messages = list(self._parse())
        wait: float | None = 0 if messages else timeout_s
        watched = [self._socket.fileno(), *([] if wake_fd is None else [wake_fd])]
        while self._socket.fileno() in select.select(watched, [], [], wait)[0]:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError("the agent closed the channel")
            self._buffer += data
            messages.extend(self._parse())
            if messages:
                wait = 0
        return messages

    def _parse(self) -> Iterator[worker_pb2.ToWorker]:
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            _check(length)
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            yield _decoded(worker_pb2.ToWorker, bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]


async def read_from_worker(reader: asyncio.StreamReader) -> worker_pb2.FromWorker:
    """The next message; raises FrameError, or asyncio.IncompleteReadError when the worker is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    _check(length)
    return _decoded(worker_pb2.FromWorker, await reader.readexactly(length))


def _decoded(kind: type[_Message], payload: bytes) -> _Message:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise FrameError(f"{len(payload)} bytes are no message: {error}") from None


def _check(length: int) -> None:
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame claims {length} bytes")
