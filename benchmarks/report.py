"""What a benchmark gives: rows with their floors and goals, as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.machine import Machine

# Unit of a ratio.
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Bound:
    """What a figure has to keep; either side may be open."""

    at_least: float | None = None
    at_most: float | None = None

    def holds(self, figure: float) -> bool:
        """Whether the figure lies inside, edges included."""
        return (self.at_least is None or figure >= self.at_least) and (
            self.at_most is None or figure <= self.at_most
        )

    def __str__(self) -> str:
        """As people write it."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Row:
    """One measured figure; `ours` and `peer` are what it comes from, `settings` how to get it again.

    `benchmark` is the name for `--only`.
    """

    benchmark: str
    what: str
    ours: str
    peer: str
    figure: float
    unit: str
    settings: str
    floor: Bound | None = None
    goal: Bound | None = None

    @property
    def verdict(self) -> str:
        """How the figure stands to floor and goal."""
        if self.goal is not None and self.goal.holds(self.figure):
            return "goal met"
        if self.floor is None:
            return "below the goal" if self.goal is not None else ""
        return "floor met" if self.floor.holds(self.figure) else "**floor missed**"


@dataclass(frozen=True)
class Skipped:
    """A part of a benchmark that this machine cannot run, and why."""

    benchmark: str
    what: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """A benchmark that did not run."""

    benchmark: str
    error: str


@dataclass(frozen=True)
class Report:
    """All that one call measured."""

    machine: Machine
    rows: Sequence[Row]
    failures: Sequence[Failure]
    skipped: Sequence[Skipped] = ()

    def to_markdown(self) -> str:
        """The machine, and a table with a line for each row."""
        lines = [f"- {fact}" for fact in self.machine.facts()]
        lines += [
            "",
            "| what | edgellm | peer | measured | floor | goal | | settings |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            figure = f"{row.figure:.2f} {row.unit}".strip()
            cells = [row.what, row.ours, row.peer, figure, row.floor or "", row.goal or "", row.verdict]
            lines.append(f"| {' | '.join(map(str, cells))} | `{row.benchmark}`: {row.settings} |")
        lines += [f"\n`{part.benchmark}`: {part.what} was skipped: {part.reason}" for part in self.skipped]
        lines += [f"\n{failure.benchmark} did not run: {failure.error}" for failure in self.failures]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, for programs."""
        document = {
            "machine": asdict(self.machine),
            "rows": [{**asdict(row), "verdict": row.verdict.strip("*")} for row in self.rows],
            "failures": [asdict(failure) for failure in self.failures],
            "skipped": [asdict(part) for part in self.skipped],
        }
        return json.dumps(document, indent=2, ensure_ascii=False)
