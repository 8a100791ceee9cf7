"""A folder of JSON lines, each with the SHA-256 of the line before: what was changed later shows.

The chain goes on from file to file; the oldest file goes when there are too many. What it cannot show is that
its last lines are missing: whoever must know that keeps a copy elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from edgellm.v1 import device_pb2
from edgellm_agent.errors import DataLossError

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 8


@dataclass(frozen=True)
class _Line:
    """One line, and where it is."""

    file: Path
    number: int
    data: bytes

    def __str__(self) -> str:
        return f"line {self.number} of {self.file}"


class Chain:
    """Blocking calls, from any thread.

    Args:
        folder: Made with the first record; nobody but the agent may read it.
        max_file_bytes: A file that would grow beyond it is left, and a new one begun.
        max_files: How many are kept.
    """

    def __init__(
        self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES, max_files: int = MAX_FILES
    ) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._max_files = max_files
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._sequence = 0
        self._head = ""

    def open(self) -> int:
        """Finds the end of the chain; returns the bytes of a torn last line, now gone. Raises OSError."""
        with self._lock:
            return self._open()

    def append(self, records: Sequence[device_pb2.AuditRecord]) -> None:
        """Writes them all, synced, or none; fills in `sequence` and `previous`. Raises OSError."""
        with self._lock:
            if self._file is None:
                self._open()
            sequence, head, lines = self._sequence, self._head, b""
            for record in records:
                sequence += 1
                record.sequence, record.previous = sequence, head
                line = json_format.MessageToJson(record, indent=None, preserving_proto_field_name=True)
                head = hashlib.sha256(line.encode()).hexdigest()
                lines += line.encode() + b"\n"
            file = self._file_for(len(lines))
            try:
                _append(file, lines)
            except OSError:
                # What is on the disk now is found out the next time.
                self._file = None
                raise
            self._file, self._sequence, self._head = file, sequence, head
            for old in self._files()[: -self._max_files]:
                old.unlink()

    def last(self, limit: int) -> list[device_pb2.AuditRecord]:
        """The last records, oldest first; what is no record is left out, and `verify` tells of it."""
        with self._lock:
            lines = deque(self._lines(), maxlen=limit)
        return [record for line in lines if (record := _parse(line.data)) is not None]

    def verify(self) -> int:
        """Reads the whole chain, and counts its records; raises DataLossError that says where it breaks."""
        with self._lock:
            count, sequence, head = 0, 0, ""
            for line in self._lines():
                record = _parse(line.data)
                if record is None:
                    raise DataLossError(f"audit log: {line} is no record: it was changed")
                if count == 0:
                    self._check_first(line, record)
                elif record.sequence != sequence + 1 or record.previous != head:
                    raise DataLossError(
                        f"audit log: {line} does not follow the line before it: one of them was changed, "
                        "moved or removed"
                    )
                count, sequence, head = count + 1, record.sequence, hashlib.sha256(line.data).hexdigest()
            return count

    def _check_first(self, line: _Line, record: device_pb2.AuditRecord) -> None:
        """Only where files have made way may the chain begin in its middle."""
        begins = record.sequence == 1 and not record.previous
        made_way = len(self._files()) >= self._max_files and line.file == _path(self._folder, record.sequence)
        if not begins and not made_way:
            raise DataLossError(f"audit log: what came before {line} was removed")

    def _open(self) -> int:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        torn = 0
        self._sequence, self._head, self._file = 0, "", _path(self._folder, 1)
        for file in reversed(self._files()):
            data = file.read_bytes()
            whole = _whole(data)
            if len(whole) < len(data):
                torn += len(data) - len(whole)
                _truncate(file, len(whole))
            if whole:
                last = _last_line(whole)
                self._sequence = json_format.Parse(last, device_pb2.AuditRecord()).sequence
                self._head, self._file = hashlib.sha256(last).hexdigest(), file
                return torn
            file.unlink()
        return torn

    def _file_for(self, size: int) -> Path:
        """Where so many bytes go. Raises OSError."""
        file = self._file or _path(self._folder, 1)
        if not file.exists() or file.stat().st_size + size <= self._max_file_bytes:
            return file
        return _path(self._folder, self._sequence + 1)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.jsonl"))

    def _lines(self) -> Iterator[_Line]:
        for file in self._files():
            data = file.read_bytes()
            # An end without a line feed is being repaired, or will be.
            for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
                yield _Line(file, number, line)


def _path(folder: Path, sequence: int) -> Path:
    """Files are named by their first record, so that they sort."""
    return folder / f"{sequence:016d}.jsonl"


def _parse(line: bytes) -> device_pb2.AuditRecord | None:
    try:
        return json_format.Parse(line, device_pb2.AuditRecord())
    except (json_format.ParseError, UnicodeDecodeError):
        return None


def _whole(data: bytes) -> bytes:
    """The file without a last line that a power cut tore."""
    whole = data[: data.rfind(b"\n") + 1]
    last = _last_line(whole)
    return whole[: -len(last) - 1] if whole and _parse(last) is None else whole


def _last_line(whole: bytes) -> bytes:
    return whole[:-1].rpartition(b"\n")[2]


def _append(file: Path, lines: bytes) -> None:
    new = not file.exists()
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if new:
        _sync_folder(file.parent)


def _truncate(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
