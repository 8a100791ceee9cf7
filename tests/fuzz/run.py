"""Runs a target on many inputs: deterministic by seed, within bounds, and with the input kept that failed."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutate import Mutator, changed_bytes

# One input; what takes longer hangs.
LONGEST_S = 30.0
# What a target may hold more after its inputs than before; a leak of 1 KiB for each of 100,000 is found.
MAX_GROWTH_BYTES = 96 << 20
# Above what the largest of our bounds (a recording of 64 MiB, a JSON tree of 4 MiB) takes.
MAX_MEMORY_BYTES = 4 << 30
# Descriptors and threads that a library makes once, with its first calls; a leak makes one for each input.
_LATE = 4
KEPT = Path(".edgellm/fuzz")


@dataclass(frozen=True)
class Target:
    """A surface and how it is tried.

    `run` gives the outcome in a word or two ("taken", or the name of a documented error); any exception is a
    fault. It may keep nothing: no file in `folder`, no descriptor, no thread.
    """

    name: str
    corpus: Sequence[bytes]
    run: Callable[[bytes], str]
    mutate: Mutator = changed_bytes
    folder: Path | None = None
    share: float = 1.0
    """Of inputs, next to the other targets': slow ones get fewer."""

    def input(self, seed: int, number: int) -> bytes:
        """The number-th input; the first ones are the corpus itself."""
        if number < len(self.corpus):
            return self.corpus[number]
        return self.mutate(random.Random(f"{seed}:{self.name}:{number}"), self.corpus)


@dataclass
class Result:
    """What came of the inputs."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)


class Fault(AssertionError):
    """An input that broke a rule; it is on disk."""

    def __init__(self, target: Target, data: bytes, what: str) -> None:
        self.path = keep(target, data)
        again = f"{Path(sys.executable).name} -m tests.fuzz --target {target.name} --input {self.path}"
        super().__init__(f"{target.name}: {what}\n  input: {self.path} ({len(data)} bytes)\n  again: {again}")


def keep(target: Target, data: bytes) -> Path:
    """Writes an input where it can be tried again."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return path


def try_one(target: Target, data: bytes) -> str:
    """The outcome of one input; raises Fault."""
    with _watched(target, data):
        try:
            return target.run(data)
        except Exception as error:
            raise Fault(target, data, f"{type(error).__name__}: {error}"[:400]) from error


def run(target: Target, inputs: int, seed: int, tick: Callable[[Result], None] = lambda _: None) -> Result:
    """Tries so many inputs; raises Fault at the first that breaks a rule."""
    result = Result(target.name)
    began = time.monotonic()
    data = b""
    before = _left(target)
    memory = _resident_bytes()
    for number in range(inputs):
        data = target.input(seed, number)
        result.outcomes[try_one(target, data)] += 1
        result.inputs += 1
        result.seconds = time.monotonic() - began
        tick(result)
        if number % 200 == 0 or number == inputs - 1:
            after = _left(target)
            if any(now > then + _LATE for now, then in zip(after, before, strict=True)):
                raise Fault(
                    target, data, f"left behind (descriptors, threads, files): {before} became {after}"
                )
            if number == 0:
                memory = _resident_bytes()
    if (grown := _resident_bytes() - memory) > MAX_GROWTH_BYTES:
        raise Fault(target, data, f"{grown >> 20} MiB more are held after {inputs} inputs")
    return result


def bound_memory() -> None:
    """Lets no input take more than the bound: an allocation beyond it fails, and that is a fault."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _left(target: Target) -> tuple[int, int, int]:
    gc.collect()
    files = 0 if target.folder is None else sum(1 for _ in target.folder.rglob("*"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), files  # noqa: PTH208


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def _watched(target: Target, data: bytes) -> Iterator[None]:
    """Ends the process if an input hangs: nothing else could, were it in a library that never returns."""
    with _WATCH.lock:
        _WATCH.current = (target, data, time.monotonic() + LONGEST_S)
    try:
        yield
    finally:
        _WATCH.current = None


class _Watch:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current: tuple[Target, bytes, float] | None = None

    def start(self) -> None:
        threading.Thread(target=self._look, name="fuzz-watch", daemon=True).start()

    def _look(self) -> None:
        while True:
            time.sleep(1)
            current = self.current
            if current is not None and time.monotonic() > current[2]:
                print(
                    f"\n{Fault(current[0], current[1], f'hangs for more than {LONGEST_S:g} s')}", flush=True
                )
                os._exit(3)


_WATCH = _Watch()


def watch() -> None:
    """Begins to look for inputs that hang."""
    _WATCH.start()
