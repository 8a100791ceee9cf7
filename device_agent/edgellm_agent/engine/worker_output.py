"""What a worker writes to its standard error, as lines of the agent's log: bounded in length and number."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("edgellm_agent.worker")

_READ_BYTES = 1 << 16
_LINE_BYTES = 4096
# So many lines pass in a second; of what comes beyond that, the last ones are shown when the second is over.
_LINES_PER_S = 100
_HELD_LINES = 50
# Slows a worker that never stops writing: nothing of it is lost that would have been shown.
_FLOOD_PAUSE_S = 0.01

_OWN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) \S+ (?P<text>.*)")
_ONNXRUNTIME = re.compile(r"\[(?P<severity>[VIWEF]):onnxruntime:")
_SEVERITIES = {
    "V": logging.DEBUG,
    "I": logging.INFO,
    "W": logging.WARNING,
    "E": logging.ERROR,
    "F": logging.ERROR,
}
_FAILURES = ("Traceback (most recent call last)", "Fatal Python error")


class WorkerOutput:
    """Reads to the end of the stream, whatever comes: a worker never waits for a full pipe for long."""

    def __init__(
        self, stream: asyncio.StreamReader, pid: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._pid = pid
        self._clock = clock
        self._level = logging.INFO
        self._unfinished = b""
        self._second_ends = 0.0
        self._left_in_second = 0
        self._held: deque[bytes] = deque(maxlen=_HELD_LINES)
        self._held_back = 0
        self._closed = False
        self._task = asyncio.create_task(self._follow(), name=f"worker-{pid}-output")

    async def close(self, timeout_s: float) -> None:
        """Takes the rest of what an ended worker has written, waiting at most so long for its end."""
        await asyncio.wait({self._task}, timeout=timeout_s)
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        try:
            # The flag, since before Python 3.12 `wait_for` can swallow a cancellation.
            while not self._closed:
                data = await self._read()
                if data == b"":
                    break
                self._take(self._split(data or b""))
                if self._held:
                    await asyncio.sleep(_FLOOD_PAUSE_S)
        finally:
            self._take([self._unfinished] if self._unfinished else [])
            self._show_held()

    async def _read(self) -> bytes | None:
        """The next bytes, b"" at the end; None when it is time to show lines that were held back."""
        if not self._held:
            return await self._stream.read(_READ_BYTES)
        with contextlib.suppress(asyncio.TimeoutError):
            wait_s = max(0.0, self._second_ends - self._clock())
            return await asyncio.wait_for(self._stream.read(_READ_BYTES), wait_s)
        return None

    def _split(self, data: bytes) -> list[bytes]:
        """Whole lines; of one without an end, no more is kept than a line may have."""
        first, *others = data.split(b"\n")
        lines = [self._unfinished + first[:_LINE_BYTES], *others]
        self._unfinished = lines.pop()[:_LINE_BYTES]
        return lines

    def _take(self, lines: list[bytes]) -> None:
        if self._clock() >= self._second_ends:
            self._show_held()
            self._second_ends, self._left_in_second = self._clock() + 1.0, _LINES_PER_S
        passing, held = lines[: self._left_in_second], lines[self._left_in_second :]
        self._left_in_second -= len(passing)
        for line in passing:
            self._show(line)
        self._held_back += len(held)
        self._held.extend(held)

    def _show_held(self) -> None:
        if left_out := self._held_back - len(self._held):
            log.warning("worker %d: %d lines are left out here: it writes too much", self._pid, left_out)
        for line in self._held:
            self._show(line)
        self._held.clear()
        self._held_back = 0

    def _show(self, line: bytes) -> None:
        text = line[:_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if not text:
            return
        self._level, text = _parsed(text, self._level)
        log.log(self._level, "worker %d: %s", self._pid, text)


def _parsed(text: str, level_before: int) -> tuple[int, str]:
    """Level and text of a line; one that tells no level goes on with what was said, and is no mere INFO."""
    if own := _OWN.fullmatch(text):
        return getattr(logging, own["level"], logging.WARNING), own["text"]
    if native := _ONNXRUNTIME.search(text):
        return _SEVERITIES[native["severity"]], text
    if text.startswith(_FAILURES):
        return logging.ERROR, text
    return max(level_before, logging.WARNING), text
