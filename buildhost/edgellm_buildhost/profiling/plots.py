"""A profile as horizontal bars in an SVG file, drawn by matplotlib (extra `bench`)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from edgellm.errors import EdgellmError
from edgellm_buildhost.profiling.profile import Row

# More bars than these are one at the end: a table shows them better.
_MOST_BARS = 40
_INK, _BAR, _BOUND = "#333333", "#2a78d6", "#e0a030"
# Typed as what it is, since the names that matplotlib lists differ between its versions.
_STYLE: Any = {
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "edgellm",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def check_available() -> None:
    """Raises EdgellmError, which names the extra, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EdgellmError("a plot needs matplotlib, which is not installed", "pip install 'edgellm[bench]'")


def bars(rows: Sequence[Row], title: str, memory_gb_s: float) -> str:
    """The SVG: a bar for each row, and in it the part that reading its bytes takes at the memory's speed."""
    # Here, since it takes half a second and no measurement needs it; without pyplot there is no global state.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    shown = _shown(rows)
    names = [row.name for row in shown]
    bounds_ms = [min(row.time_ms, row.read_bytes / memory_gb_s / 1e6) for row in shown]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 1.2 + 0.28 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        drawn = axes.barh(names, [row.time_ms for row in shown], color=_BAR, label="measured")
        axes.barh(names, bounds_ms, height=0.3, color=_BOUND, label="reading at the memory's speed")
        axes.bar_label(drawn, [f"{row.time_ms:.2f} ms, {row.share:.0%}" for row in shown], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel("ms in a step")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        axes.legend(loc="lower right")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return svg.getvalue()


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The rows, or the longest and one for the others."""
    if len(rows) <= _MOST_BARS:
        return list(rows)
    by_time = sorted(rows, key=lambda row: -row.time_ms)
    kept, others = by_time[: _MOST_BARS - 1], by_time[_MOST_BARS - 1 :]
    rest = Row(
        f"({len(others)} others)",
        sum(row.calls for row in others),
        sum(row.time_ms for row in others),
        sum(row.share for row in others),
        sum(row.read_bytes for row in others),
        sum(row.operations for row in others),
    )
    return [*kept, rest]
