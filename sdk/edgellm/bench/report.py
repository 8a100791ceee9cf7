"""A sweep as one HTML file that opens offline: what was measured, the figures, the plots, the commands."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from itertools import groupby

from edgellm.bench import plots
from edgellm.bench.device import System
from edgellm.bench.sweep import Row
from edgellm.bench.tables import HEADERS, NOTE, cells, facts


def html(system: System, rows: Sequence[Row], commands: Sequence[str]) -> str:
    """The page; raises EdgellmError if matplotlib is not installed."""
    plots.check_available()
    template = resources.files("edgellm.bench").joinpath("report.html").read_text("utf-8")
    return string.Template(template).substitute(
        title=escape(f"{system.engine} on {system.device}"),
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts(system)),
        table="\n".join([_line("th", HEADERS), *(_line("td", cells(row)) for row in rows)]),
        note=escape(NOTE),
        sections="\n".join(_sections(rows)),
        commands="\n".join(f"<li><code>{escape(command)}</code></li>" for command in commands),
    )


def _sections(rows: Sequence[Row]) -> Iterator[str]:
    """The plots, a section for each pair of lengths."""

    def lengths(row: Row) -> tuple[int, int]:
        return row.point.input_tokens, row.point.output_tokens

    for (input_tokens, output_tokens), group in groupby(sorted(rows, key=lengths), key=lengths):
        some = sorted(group, key=lambda row: row.point.load)
        yield f'<h2>{input_tokens} tokens in, {output_tokens} out</h2>\n<div class="plots">'
        yield _plot("Throughput", plots.throughput(some))
        yield _plot(
            "Time to first token",
            plots.percentiles(some, lambda found: found.time_to_first_token_ms, "time to first token"),
        )
        yield _plot(
            "Inter-token latency",
            plots.percentiles(some, lambda found: found.inter_token_latency_ms, "gap between tokens"),
        )
        yield _plot("Distribution of the gaps between tokens", plots.gap_distribution(some))
        yield _plot("Every request, in order of time", plots.timeline(some))
        yield "</div>"


def _plot(caption: str, svg: str) -> str:
    label = escape(caption, quote=True)
    return f'<figure role="img" aria-label="{label}">\n{svg}\n<figcaption>{label}</figcaption>\n</figure>'


def _line(tag: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"
