"""The recording of a board: what its kernel's files said, one snapshot a line, in JSON, plain or gzipped.

The first line is the header, each further one a snapshot with the files that changed since the one before.
A file's value is its text, `{"errno": "EAGAIN"}` where reading failed, or null once it is gone. One format
serves the recordings of owners, the shipped scenarios and the tests; `docs/telemetry.md` describes it.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, TypeAlias, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from edgellm.errors import EdgellmError

# A recording comes from anybody; within these bounds it cannot fill a disk or the memory.
MAX_BYTES = 64 << 20
MAX_LINE_BYTES = 1 << 20
MAX_TEXT = 64 << 10
MAX_FILES = 4096
MAX_SNAPSHOTS = 100_000
MAX_SECONDS = 7 * 86_400.0
_COMPONENT = re.compile(r"[A-Za-z0-9_.,:@+=-]{1,128}")
_ROOTS = ("sys", "proc", "etc", "var")


class RecordingError(EdgellmError):
    """A recording is missing, malformed or too large."""


class Unreadable(BaseModel):
    """Stands for a file that is there and does not answer, as a gated zone's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    errno: str = Field(pattern=r"^E[A-Z0-9]{1,15}$", description="as the kernel names it")


def _path(text: str) -> str:
    parts = text.split("/")
    safe = all(_COMPONENT.fullmatch(part) and part not in (".", "..") for part in parts)
    if not safe or parts[0] not in _ROOTS or not 2 <= len(parts) <= 16:
        raise ValueError(f"{text!r:.80} is no path below {', '.join(_ROOTS)}")
    return text


Content: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT)] | Unreadable | None
Files: TypeAlias = Mapping[str, Content]


class Header(BaseModel):
    """What was recorded, and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["edgellm-sysfs-recording"] = "edgellm-sysfs-recording"
    version: Literal[1] = 1
    board: str = Field(max_length=256, description="first compatible string of the device tree")
    kernel: str = Field(max_length=256, description="release of the kernel")
    l4t: str = Field(max_length=64, description="release of Jetson Linux")
    started: str = Field(max_length=64, description="wall clock at the first snapshot, ISO 8601")
    note: str = Field(default="", max_length=1024)


class Snapshot(BaseModel):
    """What changed since the snapshot before; the first one is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    t_s: float = Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False, description="since the first snapshot")
    files: dict[Annotated[str, AfterValidator(_path)], Content] = Field(max_length=MAX_FILES)


Line = TypeVar("Line", Header, Snapshot)


@dataclass(frozen=True)
class Recording:
    """A whole recording, checked; the first snapshot is at 0 s."""

    header: Header
    snapshots: tuple[Snapshot, ...]

    @property
    def duration_s(self) -> float:
        """Time of the last snapshot."""
        return self.snapshots[-1].t_s


def changes(before: Files, after: Files) -> dict[str, Content]:
    """Give what leads from one state of the files to the next."""
    gone: dict[str, Content] = dict.fromkeys(before.keys() - after.keys())
    return gone | {
        path: value for path, value in after.items() if path not in before or before[path] != value
    }


def encoded(line: Header | Snapshot) -> bytes:
    """Give a header or snapshot as a line of a recording."""
    return line.model_dump_json().encode() + b"\n"


def load(path: Path) -> Recording:
    """Read and check a recording; raises RecordingError that names the line and the field."""
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            return parse(gzip.GzipFile(fileobj=raw) if zipped else raw, str(path))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecordingError(
            f"{path}: cannot be read: {reason}", "give a file that `doctor --record-sysfs` wrote"
        ) from None


def parse(stream: IO[bytes] | gzip.GzipFile, name: str) -> Recording:
    """Read and check a recording from a stream; `name` is how errors call it."""
    lines = enumerate(_lines(stream, name), start=1)
    header = _decoded(Header, next(lines, (1, b""))[1], name, 1)
    snapshots: list[Snapshot] = []
    shape = _Shape()
    for number, line in lines:
        snapshot = _decoded(Snapshot, line, name, number)
        last_s = snapshots[-1].t_s if snapshots else None
        if snapshot.t_s != 0 if last_s is None else snapshot.t_s <= last_s:
            rule = "must be 0 in the first snapshot" if last_s is None else f"must be later than {last_s:g}"
            raise _wrong(name, number, "t_s", rule)
        if len(snapshots) == MAX_SNAPSHOTS:
            raise _wrong(name, number, "t_s", f"more than {MAX_SNAPSHOTS} snapshots")
        if (path := shape.misfit(snapshot.files)) is not None:
            raise _wrong(name, number, f"files.{path}", "is a file and a folder, or one file too many")
        snapshots.append(snapshot)
    if not snapshots:
        raise _wrong(name, 2, "t_s", "there is no snapshot")
    return Recording(header, tuple(snapshots))


def _lines(stream: IO[bytes] | gzip.GzipFile, name: str) -> Iterator[bytes]:
    total = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        total += len(line)
        if len(line) > MAX_LINE_BYTES or total > MAX_BYTES:
            raise RecordingError(
                f"{name}: more than {MAX_LINE_BYTES} bytes in a line or {MAX_BYTES} in all",
                "record for a shorter time, or at a longer interval",
            )
        yield line


def _decoded(model: type[Line], line: bytes, name: str, number: int) -> Line:
    try:
        return model.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise _wrong(name, number, field, first["msg"]) from None


def _wrong(name: str, number: int, field: str, rule: str) -> RecordingError:
    return RecordingError(
        f"{name}: line {number}: {field:.200}: {rule:.200}", "record it again, or mend that line"
    )


class _Shape:
    """Which paths were files and which folders so far: none may be both, in a tree that is written out."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def misfit(self, files: Files) -> str | None:
        """Take the paths in; gives one that does not fit, None if all do."""
        for path in files:
            if path in self._files:
                continue
            above = [path[:end] for end in (match.start() for match in re.finditer("/", path))]
            self._files.add(path)
            self._folders.update(above)
            if path in self._folders or not self._files.isdisjoint(above) or len(self._files) > MAX_FILES:
                return path
        return None
