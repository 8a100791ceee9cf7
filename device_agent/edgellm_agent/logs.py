"""The last lines of the agent's log, kept in memory for those who ask over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from edgellm.v1 import device_pb2
from edgellm_agent.errors import BusyError

LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
}
_MAX_LINES = 2000
_MAX_BYTES = 1 << 20
_MAX_LINE_CHARS = 2000
# What an entry costs beside its text.
_ENTRY_BYTES = 200
# A reader that is so far behind loses the oldest line for each new one.
_QUEUE_LINES = 500
_MAX_FOLLOWERS = 16


@dataclass(frozen=True)
class _Line:
    time_ns: int
    level: int
    logger: str
    text: str

    @property
    def size_bytes(self) -> int:
        return _ENTRY_BYTES + len(self.text.encode())

    def to_proto(self) -> device_pb2.LogLine:
        line = device_pb2.LogLine(level=logging.getLevelName(self.level), logger=self.logger, text=self.text)
        line.time.FromNanoseconds(self.time_ns)
        return line


class LogRing(logging.Handler):
    """Keeps the newest lines, bounded in number and in bytes, and hands new ones to readers.

    A record with a trace is several lines. Text is without control characters, so that no reader's terminal
    can be commanded by it. Log from any thread; read on an event loop.
    """

    def __init__(self, max_lines: int = _MAX_LINES, max_bytes: int = _MAX_BYTES) -> None:
        super().__init__()
        self.max_lines = max_lines
        self._max_bytes = max_bytes
        self._lines: deque[_Line] = deque()
        self._size_bytes = 0
        self._followers: set[_Follower] = set()
        self._closed = False
        # Reentrant: an object that logs while it is collected may do so in the middle of `emit`.
        self._state = threading.RLock()

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a record."""
        try:
            time_ns, text = int(record.created * 1e9), self.format(record)
            lines = [_Line(time_ns, record.levelno, record.name, _clean(part)) for part in text.splitlines()]
        except Exception:  # noqa: BLE001 - as any handler: a record that cannot be written ends nothing else
            self.handleError(record)
            return
        with self._state:
            for line in lines:
                self._keep(line)
                for follower in self._followers:
                    follower.put(line)

    def close(self) -> None:
        """Ends all readers; lines are still kept."""
        with self._state:
            self._closed = True
            for follower in self._followers:
                follower.wake()
        super().close()

    async def read(
        self, lines: int, least: int = logging.INFO, *, follow: bool = False
    ) -> AsyncGenerator[device_pb2.LogLine, None]:
        """The last `lines` of at least that level; with `follow` then each new one, until `close`.

        A reader that is too slow loses the oldest lines, and a line tells it how many. Raises BusyError when
        too many follow already.
        """
        follower = _Follower(least)
        with self._state:
            if follow and len(self._followers) >= _MAX_FOLLOWERS:
                raise BusyError(f"{_MAX_FOLLOWERS} readers follow the log already")
            begin = self._last(lines, least)
            if follow:
                self._followers.add(follower)
        try:
            for line in begin:
                yield line.to_proto()
            ending = not follow
            while not ending:
                # Asked before the lines are taken, so that the last ones are among them.
                ending = self._closed
                if not ending:
                    await follower.news()
                for line in follower.take():
                    yield line.to_proto()
        finally:
            with self._state:
                self._followers.discard(follower)

    def _keep(self, line: _Line) -> None:
        self._lines.append(line)
        self._size_bytes += line.size_bytes
        while len(self._lines) > self.max_lines or self._size_bytes > self._max_bytes:
            self._size_bytes -= self._lines.popleft().size_bytes

    def _last(self, count: int, least: int) -> list[_Line]:
        return [line for line in self._lines if line.level >= least][-count:]


@contextlib.contextmanager
def recording() -> Iterator[LogRing]:
    """A ring that has all that is logged while the context lasts."""
    ring = LogRing()
    logging.getLogger().addHandler(ring)
    try:
        yield ring
    finally:
        logging.getLogger().removeHandler(ring)
        ring.close()


class _Follower:
    """What one reader has not taken yet."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._told = False
        self._waiting: deque[_Line] = deque(maxlen=_QUEUE_LINES)
        self._lost = 0
        self._state = threading.RLock()

    def put(self, line: _Line) -> None:
        """From any thread."""
        if line.level < self._least:
            return
        with self._state:
            self._lost += len(self._waiting) == _QUEUE_LINES
            self._waiting.append(line)
        self.wake()

    def wake(self) -> None:
        """From any thread; once is enough until `take`, so that a flood of lines is no flood of callbacks."""
        with self._state:
            told, self._told = self._told, True
        if not told:
            with contextlib.suppress(RuntimeError):  # its loop may be closed by now
                self._loop.call_soon_threadsafe(self._news.set)

    async def news(self) -> None:
        await self._news.wait()

    def take(self) -> list[_Line]:
        with self._state:
            lines, lost = list(self._waiting), self._lost
            self._waiting.clear()
            self._lost, self._told = 0, False
            self._news.clear()
        if lost:
            text = f"{lost} lines are left out here: they came faster than they were read"
            lines.insert(0, _Line(time.time_ns(), logging.WARNING, __name__, text))
        return lines


def _clean(text: str) -> str:
    """Without control characters, and no longer than a line may be."""
    if not text.isprintable():
        text = "".join(char for char in text.replace("\t", "    ") if char.isprintable())
    return text if len(text) <= _MAX_LINE_CHARS else f"{text[: _MAX_LINE_CHARS - 1]}…"
