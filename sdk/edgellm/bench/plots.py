"""Plots of a sweep as SVG that follows the page's colours, drawn by matplotlib (extra `bench`)."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgellm.bench.metrics import Distribution, Metrics, gaps_s, ttft_s
from edgellm.bench.sweep import Row
from edgellm.errors import EdgellmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib draws with; the page's CSS variables take their place in the SVG, so that one
# drawing serves light and dark pages.
_INK, _GRID = "#010101", "#020202"
_SERIES = tuple(f"#0{number}0000" for number in range(1, 7))
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES, start=1)
}
_MARKERS = "osD^vP"
# Typed as what it is, since the names that matplotlib lists differ between its versions.
_STYLE: Any = {
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
}
# The shortest gap that is drawn on the logarithmic axis; tokens that arrive together are 0 apart.
_SHORTEST_MS = 0.1


def check_available() -> None:
    """Raises EdgellmError, which names the extra, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EdgellmError(
            "a report needs matplotlib, which is not installed", "pip install 'edgellm[bench]'"
        )


def throughput(rows: Sequence[Row]) -> str:
    """Output tokens per second over the load."""
    with _figure() as (axes, svg):
        loads = [row.point.load for row in rows]
        rates = [row.metrics.system_output_throughput_tok_s for row in rows]
        axes.plot(loads, rates, color=_SERIES[0], marker=_MARKERS[0])
        _label(axes, _load_name(rows), "output tokens per second", zero=True)
        axes.set_xticks(loads)
    return svg()


def percentiles(rows: Sequence[Row], of: Callable[[Metrics], Distribution | None], name: str) -> str:
    """p50, p90 and p99 of a latency over the load, in milliseconds."""
    shown = [(row.point.load, found) for row in rows if (found := of(row.metrics)) is not None]
    with _figure() as (axes, svg):
        for number, percentile in enumerate(("p50", "p90", "p99")):
            values = [getattr(found, percentile) for _, found in shown]
            loads = [load for load, _ in shown]
            axes.plot(loads, values, color=_SERIES[number], marker=_MARKERS[number], label=percentile)
        _label(axes, _load_name(rows), f"{name}, ms", zero=True)
        axes.set_xticks([row.point.load for row in rows])
        axes.legend()
    return svg()


def gap_distribution(rows: Sequence[Row]) -> str:
    """Share of the gaps between tokens that are no longer than so many milliseconds, for each load."""
    with _figure() as (axes, svg):
        for number, row in enumerate(rows):
            gaps = [max(_SHORTEST_MS, gap * 1e3) for record in row.records for gap in gaps_s(record)]
            if gaps:
                axes.ecdf(gaps, label=_load_label(row), color=_SERIES[number % len(_SERIES)])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        _label(axes, "gap between tokens, ms", "share of the gaps")
        _legend(axes)
    return svg()


def timeline(rows: Sequence[Row]) -> str:
    """Time to first token and latency of each request, by the time at which it began."""
    records = [record for row in rows for record in row.records]
    start_s = min((record.began_s for record in records), default=0.0)
    with _figure() as (axes, svg):
        for number, row in enumerate(rows):
            good = [record for record in row.records if record.error is None]
            color, at_s = _SERIES[number % len(_SERIES)], [record.began_s - start_s for record in good]
            latency_s = [record.ended_s - record.began_s for record in good]
            axes.scatter(at_s, latency_s, s=18, color=color, label=_load_label(row))
            axes.scatter(at_s, [ttft_s(record) or 0.0 for record in good], s=18, color=color, marker="x")
        _label(axes, "time since the start, s", "latency (dot), first token (cross), s", zero=True)
        _legend(axes)
    return svg()


def _load_name(rows: Sequence[Row]) -> str:
    return "requests per second, sent" if rows[0].point.rate else "concurrent requests"


def _load_label(row: Row) -> str:
    return f"{row.point.rate:g} req/s" if row.point.rate else f"{row.point.concurrency} at once"


def _label(axes: Axes, x: str, y: str, *, zero: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if zero:
        axes.set_ylim(bottom=0)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


@contextmanager
def _figure() -> Iterator[tuple[Axes, Callable[[], str]]]:
    """Axes to draw on, and what turns them into an `<svg>` element afterwards."""
    # Here, since it takes half a second and no measurement needs it; without pyplot there is no global state.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        drawn = io.StringIO()

        def svg() -> str:
            return _themed(drawn.getvalue())

        yield figure.add_subplot(), svg
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def _themed(document: str) -> str:
    """The bare element, in the page's colours and as wide as it likes.

    Names of groups go, since an id may be on a page only once; those that are referred to are unique.
    """
    element = document[document.index("<svg") :].strip()
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    element = re.sub(r'<g id="[^"]*">', "<g>", element)
    for stand_in, variable in _VARIABLES.items():
        element = element.replace(stand_in, variable)
    return element
