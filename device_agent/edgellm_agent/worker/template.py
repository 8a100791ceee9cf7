"""The chat template of a bundle, rendered in a process of its own: it is a program from elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import IO, cast

# The longest that were seen, with tools in several languages, have 20 kB.
MAX_SOURCE_BYTES = 256 << 10
# A text of 4 MiB in JSON, where a character may become six.
_MAX_ANSWER_BYTES = 32 << 20
# The process bounds its processor time at a second. This is for a machine that gives it next to none;
# one with much else to do must not refuse a good template.
_WAIT_S = 30.0
# One that waits for stdin takes milliseconds to end.
_LAST_S = 0.5


class TemplateRefusedError(ValueError):
    """The template makes no text of these messages, or is none, and why; never says what it was given."""


class ChatTemplate:
    """One template and its process (template_process.py); thread-safe.

    The process is started with the template and whenever it had to be ended; it goes with this object.
    """

    def __init__(self, source: str) -> None:
        """Raises TemplateRefusedError if the source is no template, or takes too much to compile."""
        if len(source.encode()) > MAX_SOURCE_BYTES:
            raise TemplateRefusedError(f"it has more than {MAX_SOURCE_BYTES >> 10} KiB")
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes]], ChatTemplate] | None = None
        with self._lock:
            self._started()

    def render(self, variables: Mapping[str, object]) -> str:
        """The text; raises TemplateRefusedError."""
        with self._lock:
            return self._ask(self._started(), variables)

    def close(self) -> None:
        """Ends the process; a later `render` starts another."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "edgellm_agent.worker.template_process"]
            # What a failing allocation says on stderr is the template's doing and not ours.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._finalizer = weakref.finalize(self, _end, self._process)
            try:
                self._ask(self._process, self._source)
            except TemplateRefusedError:
                self._end()
                raise
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], question: object) -> str:
        try:
            pipe = cast("IO[bytes]", process.stdin)
            pipe.write(json.dumps(question).encode() + b"\n")
            pipe.flush()
            line = _line(cast("IO[bytes]", process.stdout).fileno())
        except OSError as error:
            self._end()
            raise TemplateRefusedError(_reason(process, error)) from None
        answer = json.loads(line)
        if "refused" in answer:
            raise TemplateRefusedError(str(answer["refused"]))
        return str(answer["text"])

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = None


def _line(descriptor: int) -> bytes:
    """The next line; raises OSError when there is none, or not in time."""
    deadline = time.monotonic() + _WAIT_S
    line = bytearray()
    while not line.endswith(b"\n"):
        left_s = max(0.0, deadline - time.monotonic())
        if not select.select([descriptor], [], [], left_s)[0]:
            raise TimeoutError(f"no answer within {_WAIT_S:.0f} s")
        data = os.read(descriptor, 1 << 16)
        if not data or len(line) > _MAX_ANSWER_BYTES:
            raise BrokenPipeError("it ended")
        line += data
    return bytes(line)


def _reason(process: subprocess.Popen[bytes], error: OSError) -> str:
    match process.returncode:
        case code if code == -signal.SIGPROF:
            return "it takes too much processor time"
        case code if code in {-signal.SIGSEGV, -signal.SIGBUS}:
            return "it is nested too deeply"
        case _:
            return f"the process that renders it failed: {error}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Without its stdin it ends by itself, and so does one that ran into a bound: that leaves the reason."""
    with contextlib.suppress(OSError):
        cast("IO[bytes]", process.stdin).close()
    try:
        process.wait(_LAST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    cast("IO[bytes]", process.stdout).close()
