"""What a command takes at its peak, all its processes together."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_S = 0.05
_STDERR_CHARACTERS = 2000
_GB = 1e9


@dataclass(frozen=True)
class PeakMemory:
    """How a command ended, how long it took and what its processes held at most at one time.

    `unevictable_bytes` is RssAnon + RssShmem: what the system cannot take back. `resident_bytes` has the
    pages of mapped files too, which it can.
    """

    status: int
    unevictable_bytes: int
    resident_bytes: int
    seconds: float
    stdout: str
    stderr: str

    def __str__(self) -> str:
        """The figures, for people."""
        return (
            f"exit {self.status}, {self.seconds:.1f} s, "
            f"{self.unevictable_bytes / _GB:.2f} GB unevictable, {self.resident_bytes / _GB:.2f} GB resident"
        )

    def check(self, what: str) -> PeakMemory:
        """The same; raises RuntimeError if the command failed."""
        if self.status != 0:
            raise RuntimeError(f"{what} failed with {self.status}: {self.stderr[-_STDERR_CHARACTERS:]}")
        return self


def peak_memory(command: Sequence[str], *, timeout_s: float, folder: Path) -> PeakMemory:
    """Run `command` to its end and watch its processes at 20 Hz; its output passes through `folder`.

    Raises subprocess.TimeoutExpired, with the command killed, when it runs longer than `timeout_s`.
    """
    paths = [folder / name for name in ("stdout.txt", "stderr.txt")]
    began = time.perf_counter()
    with paths[0].open("w+") as stdout, paths[1].open("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        try:
            unevictable, resident = _watch(process, began + timeout_s)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    seconds = time.perf_counter() - began
    texts = [path.read_text("utf-8", errors="replace") for path in paths]
    for path in paths:
        path.unlink()
    return PeakMemory(process.returncode, unevictable, resident, seconds, *texts)


def _watch(process: subprocess.Popen[bytes], deadline: float) -> tuple[int, int]:
    unevictable = resident = 0
    while process.poll() is None:
        if time.perf_counter() > deadline:
            raise subprocess.TimeoutExpired(process.args, deadline)
        samples = list(_samples(process.pid))
        unevictable = max(unevictable, sum(s["RssAnon"] + s["RssShmem"] for s in samples))
        # ru_maxrss would not do: what the parent held when it forked is in it. VmHWM starts anew with exec.
        high_water = max((s["VmHWM"] for s in samples), default=0)
        resident = max(resident, high_water, sum(s["VmRSS"] for s in samples))
        time.sleep(_SAMPLE_S)
    return unevictable, resident


def _samples(pid: int) -> Iterator[dict[str, int]]:
    """The memory of a process and of its descendants, bytes by the names of /proc/PID/status."""
    for member in _tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text("utf-8").splitlines()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in lines if line.startswith(("Rss", "Vm")))
        if "VmRSS" in fields:  # absent once the process has ended and nobody has asked for its status
            yield {name: 1024 * int(value.split()[0]) for name, value in fields.items()}


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text("utf-8").split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def main() -> int:
    """`python -m benchmarks.peak_memory COMMAND ...` prints the figures behind the command's own output."""
    peak = peak_memory(sys.argv[1:], timeout_s=24 * 3600, folder=Path.cwd())
    print(peak.stdout, end="")
    print(peak.stderr, end="", file=sys.stderr)
    print(peak)
    return peak.status


if __name__ == "__main__":
    sys.exit(main())
