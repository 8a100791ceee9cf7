"""The source that plays a recording back: the real readers, over a tree that changes as the board's did."""

import shutil
import tempfile
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from edgellm_agent.telemetry import recording
from edgellm_agent.telemetry.base import Clock, Part, PartName, Probe
from edgellm_agent.telemetry.recording import Files, Recording, RecordingError
from edgellm_agent.telemetry.sysfs import SysfsSource

_SHIPPED = ".jsonl.gz"


def scenario_names() -> list[str]:
    """Names of the shipped scenarios, sorted."""
    names = (entry.name for entry in resources.files("edgellm_agent.telemetry.scenarios").iterdir())
    return sorted(name.removesuffix(_SHIPPED) for name in names if name.endswith(_SHIPPED))


def load_recording(target: str) -> Recording:
    """Give the shipped scenario of that name, else the recording in the file of that name.

    Raises RecordingError.
    """
    if target not in scenario_names():
        if not Path(target).exists():
            raise RecordingError(
                f"no recording {target}",
                f"give an existing file, or a scenario: {', '.join(scenario_names())}",
            )
        return recording.load(Path(target))
    shipped = resources.files("edgellm_agent.telemetry.scenarios") / f"{target}{_SHIPPED}"
    with resources.as_file(shipped) as path:
        return recording.load(path)


class ReplaySource:
    """Plays a recording from the first read on, and stays with its last snapshot.

    It owns a private folder, from construction to `close`. Time passes by the clock, `speed` times as fast.
    """

    name = "replay"

    def __init__(self, recorded: Recording, *, speed: float = 1.0, clock: Clock | None = None) -> None:
        clock = clock or Clock()
        # Where the tree is.
        self.root = Path(tempfile.mkdtemp(prefix="edgellm-replay-"))
        self._play = _Play(recorded, self.root, speed, clock)
        # Readers look again for what they miss after some time: after some of the recording's.
        time = Clock(monotonic_ns=lambda: round(clock.monotonic_ns() * speed))
        inner = SysfsSource(self.root, time)
        self.probes: tuple[Probe, ...] = tuple(_Replayed(probe, self._play.advance) for probe in inner.probes)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.root, ignore_errors=True)


class _Replayed:
    """A probe of the tree, which is brought up to date before it is read."""

    def __init__(self, probe: Probe, advance: Callable[[], None]) -> None:
        self.part: PartName = probe.part
        self._probe = probe
        self._advance = advance

    def read(self) -> Part | None:
        self._advance()
        return self._probe.read()


class _Play:
    """Brings a tree to where the recording is by now."""

    def __init__(self, recorded: Recording, root: Path, speed: float, clock: Clock) -> None:
        self._snapshots = recorded.snapshots
        self._root = root
        self._speed = speed
        self._clock = clock
        self._next = 0
        self._started_ns: int | None = None
        # Probes are read on threads of the sampler.
        self._lock = threading.Lock()
        self._apply(0.0)

    def advance(self) -> None:
        """Apply every snapshot whose time has come."""
        with self._lock:
            now_ns = self._clock.monotonic_ns()
            if self._started_ns is None:
                self._started_ns = now_ns
            self._apply((now_ns - self._started_ns) / 1e9 * self._speed)

    def _apply(self, now_s: float) -> None:
        # Clocks count in nanoseconds, recordings in milliseconds.
        while self._next < len(self._snapshots) and self._snapshots[self._next].t_s <= now_s + 1e-6:
            write_tree(self._root, self._snapshots[self._next].files)
            self._next += 1


def write_tree(root: Path, files: Files) -> None:
    """Write files below a root as a checked recording has them."""
    for path, content in files.items():
        file = root / path
        if isinstance(content, str):
            file.parent.mkdir(parents=True, exist_ok=True)
            _replace(file, content.encode("utf-8", "replace"))
            continue
        _clear(file)
        if content is not None:
            # Reading a folder fails with an OSError, as reading a gated sensor does.
            file.mkdir(parents=True, exist_ok=True)


def _replace(file: Path, content: bytes) -> None:
    """At once: a read that was slow, and is still under way, finds the old or the new figure."""
    if file.is_dir():
        file.rmdir()
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_bytes(content)
    fresh.replace(file)


def _clear(file: Path) -> None:
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
