"""The governor on a simulated board: a plot and a table, beside no governor and the best constant cap.

    python -m benchmarks.governor --plot docs/img/governor.svg

The board is `tests.support.thermal_model`: a model, not a measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.v1 import telemetry_pb2
from edgellm_agent.governor.observation import observe
from edgellm_agent.governor.policy import Governor
from edgellm_agent.governor.settings import GovernorSettings
from tests.support.thermal_model import (
    TRIP_CELSIUS,
    Board,
    Capped,
    Governed,
    Simulation,
    Trace,
    air_rises,
    bursts,
    fan_fails_at,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONG_S, _WARM_UP_S = 3600, 600
_FAN_FAILS_S = 1800
# One of so many samples is drawn.
_DRAWN_S = 6
SCENARIOS = {
    "steady load, air at 45 °C": Simulation(Board(air_celsius=45.0)),
    "the fan fails after 30 min": Simulation(Board(), change=fan_fails_at(_FAN_FAILS_S, 1.8), seed=1),
    "air from 35 to 60 °C in 10 min": Simulation(Board(), change=air_rises(900, 600, 25.0), seed=2),
    "bursts of 60 s, 30 s apart, air at 50 °C": Simulation(Board(air_celsius=50.0), bursts(60, 30), seed=3),
}
_PLOTTED = "the fan fails after 30 min"
_COLORS = {"NOMINAL": "#4c9f70", "WARM": "#e3b23c", "HOT": "#e07a3f", "CRITICAL": "#c23b3b"}
_GOVERNED, _BARE = "#1f5fa8", "#999999"


@dataclass(frozen=True)
class Result:
    """One board, three ways."""

    governed: Trace
    states: list[str]
    bare: Trace
    capped: Trace
    cap: float


def run(simulation: Simulation) -> Result:
    """Runs a scenario for an hour each way."""
    governor = Governed()
    cap = simulation.best_cap(_LONG_S)
    return Result(
        governed=simulation.run(governor, _LONG_S),
        states=governor.states,
        bare=simulation.run(Capped(1.0), _LONG_S),
        capped=simulation.run(Capped(cap), _LONG_S),
        cap=cap,
    )


def table(results: dict[str, Result]) -> str:
    """Markdown: peak, tokens and throttling."""
    rows = [
        "| scenario | | peak °C | tokens/s | board throttled | state changes |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        changes = sum(a != b for a, b in zip(result.states, result.states[1:], strict=False))
        kinds = (
            ("governor", result.governed, str(changes)),
            (f"best constant cap ({result.cap:.2f})", result.capped, ""),
            ("neither", result.bare, ""),
        )
        for column, (kind, trace, said) in enumerate(kinds):
            rate = trace.tokens(_WARM_UP_S) / (_LONG_S - _WARM_UP_S)
            cells = (
                "" if column else name,
                kind,
                f"{trace.peak_celsius:.1f}",
                f"{rate:.1f}",
                f"{trace.throttled_s:.0f} s",
                said,
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def update_cost_us(rounds: int = 5, records: int = 2000) -> list[float]:
    """Microseconds for one record, observation included: one figure per round, in order of size."""
    figures = []
    for _ in range(rounds):
        governor = Governor(GovernorSettings(power_budget_mw=15_000), 8, 1 << 29)
        made = [_record(i) for i in range(records)]
        began = time.perf_counter()
        for record in made:
            governor.update(observe(record))
        figures.append(1e6 * (time.perf_counter() - began) / records)
    return sorted(figures)


def _record(number: int) -> telemetry_pb2.Telemetry:
    record = telemetry_pb2.Telemetry(sequence=number, monotonic_ns=(number + 1) * 1_000_000_000)
    record.thermal.margin_celsius = 3.0 + (number * 7 % 11) / 10
    record.power.total_mw = 14_000
    record.power.over_current.add(kind="average", events=1)
    record.memory.available_bytes = 1 << 30
    record.runtime.running_sequences = 4
    return record


def plot(result: Result, title: str, path: Path) -> None:
    """Temperature, pace and state, tokens per second over the hour."""
    import matplotlib as mpl  # noqa: PLC0415 - the table needs none

    mpl.use("svg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    mpl.rcParams["svg.hashsalt"] = "edgellm"  # the same figures give the same file
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    minutes = [second / 60 for second in range(0, _LONG_S, _DRAWN_S)]
    parts: tuple[Callable[..., None], ...] = (_temperature, _pace, _tokens)
    for part, each in zip(parts, axes, strict=True):
        part(each, minutes, result)
        each.grid(alpha=0.3)
        each.axvline(_FAN_FAILS_S / 60, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_title(f"Simulated board: {title}")
    axes[-1].set_xlabel("minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata)
    plt.close(figure)


def _temperature(axes: Axes, minutes: list[float], result: Result) -> None:
    axes.plot(minutes, result.bare.celsius[::_DRAWN_S], color=_BARE, linewidth=1, label="without governor")
    axes.plot(
        minutes, result.governed.celsius[::_DRAWN_S], color=_GOVERNED, linewidth=1, label="with governor"
    )
    axes.axhline(TRIP_CELSIUS, color="#c23b3b", linewidth=1, linestyle="--", label="trip point")
    axes.set_ylabel("die, °C")
    axes.legend(loc="lower right")


def _pace(axes: Axes, minutes: list[float], result: Result) -> None:
    axes.plot(minutes, result.governed.pace[::_DRAWN_S], color=_GOVERNED, linewidth=1)
    for state, color in _COLORS.items():
        inside = [seen == state for seen in result.states[::_DRAWN_S]]
        axes.fill_between(minutes, 0, 1.05, where=inside, color=color, alpha=0.25, linewidth=0, label=state)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("pace and state")
    axes.legend(loc="lower left", ncols=4)


def _tokens(axes: Axes, minutes: list[float], result: Result) -> None:
    axes.plot(
        minutes, result.bare.tokens_per_s[::_DRAWN_S], color=_BARE, linewidth=1, label="without governor"
    )
    axes.plot(
        minutes, result.governed.tokens_per_s[::_DRAWN_S], color=_GOVERNED, linewidth=1, label="with governor"
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    axes.legend(loc="lower left")


def main() -> None:
    """Prints the table; with --plot, draws one scenario too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.governor", description=__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw (needs the extra `bench`)")
    options = parser.parse_args()
    results = {name: run(simulation) for name, simulation in SCENARIOS.items()}
    print(table(results))
    cost = update_cost_us()
    print(f"\none record: {cost[len(cost) // 2]:.0f} µs (median of {len(cost)} rounds)")
    if options.plot is not None:
        plot(results[_PLOTTED], _PLOTTED, options.plot)


if __name__ == "__main__":
    main()
