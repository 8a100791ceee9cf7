"""Takes a recording: exactly the files that the readers look at, and of tables only the lines they use."""

import errno
import gzip
import io
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from edgellm.errors import EdgellmError
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.files import Wanted, read_bytes, read_text
from edgellm_agent.telemetry.recording import (
    MAX_BYTES,
    MAX_FILES,
    MAX_SNAPSHOTS,
    MAX_TEXT,
    Content,
    Header,
    Snapshot,
    Unreadable,
    changes,
    encoded,
)
from edgellm_agent.telemetry.sysfs import FILES, board_name, l4t_release

# A swap file's name may tell who lives here; the readers only add up its figures.
_SWAP_FILE = re.compile(r"^/(?!dev/)\S+", re.MULTILINE)


def take(root: Path, wanted: Iterable[Wanted] = FILES) -> dict[str, Content]:
    """Read all wanted files once."""
    found: dict[str, Content] = {}
    for want in wanted:
        for path in sorted(root.glob(want.pattern)):
            if len(found) == MAX_FILES:
                return found
            with suppress(FileNotFoundError):
                found[path.relative_to(root).as_posix()] = _content(path, want)
    return found


def _content(path: Path, want: Wanted) -> Content:
    try:
        raw = read_bytes(path, MAX_TEXT)
    except FileNotFoundError:
        raise
    except OSError as error:
        return Unreadable(errno=errno.errorcode.get(error.errno or 0, "EIO"))
    text = raw.decode("utf-8", "replace")
    if want.lines is not None:
        kept = re.compile(want.lines)
        text = "".join(line for line in text.splitlines(keepends=True) if kept.match(line))
    return _SWAP_FILE.sub("/swapfile", text) if want.pattern == "proc/swaps" else text


def header(root: Path, clock: Clock) -> Header:
    """Tell what is recorded; nothing in it names the device or its owner."""
    started = datetime.fromtimestamp(clock.wall_ns() / 1e9, timezone.utc)
    return Header(
        board=board_name(root)[:256],
        kernel=(read_text(root / "proc/sys/kernel/osrelease") or "")[:256],
        l4t=l4t_release(root),
        started=started.isoformat(timespec="seconds"),
    )


class Recorder:
    """Collects snapshots in memory, gzipped, and writes them to a file that was not there before."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        self._packed = io.BytesIO()
        self._zip = gzip.GzipFile(fileobj=self._packed, mode="wb", mtime=0)
        self._before: dict[str, Content] = {}
        self._started_ns = 0
        self._t_s: float | None = None
        self._bytes = 0
        self.count = 0

    async def run(self, seconds: float, interval_s: float, progress: Callable[[float], None]) -> None:
        """Record for so long, or until it is full; cancelled, it keeps what it has."""
        started_ns = self._clock.monotonic_ns()
        while self.snapshot():
            elapsed_s = (self._clock.monotonic_ns() - started_ns) / 1e9
            progress(min(elapsed_s, seconds))
            if elapsed_s >= seconds:
                return
            await self._clock.sleep(min(interval_s - elapsed_s % interval_s, seconds - elapsed_s + 1e-3))

    def snapshot(self) -> bool:
        """Add the files as they are now; gives False, and adds nothing, once the recording is full."""
        now_ns = self._clock.monotonic_ns()
        if self._t_s is None:
            self._started_ns, self._t_s = now_ns, 0.0
            self._write(encoded(header(self._root, self._clock)))
        else:
            # A sleep that ends early must not give two snapshots one time.
            self._t_s = round(max((now_ns - self._started_ns) / 1e9, self._t_s + 1e-3), 3)
        after = take(self._root)
        line = encoded(Snapshot(t_s=self._t_s, files=changes(self._before, after)))
        if self.count == MAX_SNAPSHOTS or self._bytes + len(line) > MAX_BYTES:
            return False
        self._write(line)
        self._before = after
        self.count += 1
        return True

    @property
    def files(self) -> int:
        """How many files the last snapshot had."""
        return len(self._before)

    def save(self, file: Path) -> int:
        """Write the recording, whole or not at all, and give its size in bytes; raises EdgellmError."""
        if not self.count:
            raise EdgellmError("nothing was recorded yet", "let it run for a second at least")
        self._zip.close()
        packed = self._packed.getvalue()
        text = packed if file.suffix == ".gz" else gzip.decompress(packed)
        refuse_existing(file)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            partial.write_bytes(text)
            # Between the look above and this, nobody else is expected to write here.
            partial.rename(file)
        finally:
            partial.unlink(missing_ok=True)
        return len(text)

    def _write(self, line: bytes) -> None:
        self._bytes += len(line)
        self._zip.write(line)


def refuse_existing(file: Path) -> None:
    """Raise EdgellmError if the file is there or could not be made."""
    if file.exists() or file.is_symlink():
        raise EdgellmError(f"{file} exists already", "give a name that is free")
    if not file.parent.is_dir():
        raise EdgellmError(f"there is no folder {file.parent}", "make it first, or give another one")
