"""Builds by the command line, as a user runs them: undisturbed, cut off, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A build of a tiny model takes a second or two; this is for a machine with other work.
_DEADLINE_S = 100.0


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended."""

    code: int
    output: str
    errors: str
    told: list[str]
    """Each progress: stage, done, total."""

    @property
    def digest(self) -> str:
        """Of the engine that was built."""
        assert self.code == 0, self.errors
        return str(json.loads(self.output)["digest"])

    def first(self, stage: str) -> int:
        """What of a stage was done when the run began with it."""
        return next(int(line.split()[-2]) for line in self.told if line.startswith(f"{stage} "))


@dataclass
class BuildHost:
    """A machine with a data directory, and a directory for what is made."""

    root: Path
    prefix: tuple[str, ...] = ()
    """What goes before each command."""
    home: Path = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home, self.out = self.root / "home", self.root / "out"
        self.out.mkdir(parents=True)

    @property
    def target(self) -> Path:
        """Where the bundle goes."""
        return self.out / "engine.bundle"

    def command(self, *arguments: object) -> list[str]:
        """The program with these arguments."""
        return [*self.prefix, sys.executable, "-m", "tests.support.cut_build", *map(str, arguments)]

    def environment(self, **cut: str) -> dict[str, str]:
        """Of the program; `cut` as `cut_build` has it."""
        return {**os.environ, "EDGELLM_HOME": str(self.home), "TOLD": str(self.root / "told"), **cut}

    def run(self, *arguments: object, **cut: str) -> Ended:
        """Runs the program to its end."""
        (self.root / "told").write_text("")
        ended = subprocess.run(
            self.command(*arguments),
            env=self.environment(**cut),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
        told = (self.root / "told").read_text().splitlines()
        return Ended(ended.returncode, ended.stdout, ended.stderr, told)

    def build(self, source: Path, *options: object, **cut: str) -> Ended:
        """`edgellm build` to `target`."""
        return self.run("build", source, "-o", self.target, "--json", *options, **cut)

    def made(self) -> list[str]:
        """Names of what a user sees where things are made."""
        return sorted(path.name for path in self.out.iterdir() if not path.name.startswith("."))

    def workspaces(self) -> list[Path]:
        """What is kept for another try."""
        work = self.home / "work"
        return sorted(work.iterdir()) if work.exists() else []
