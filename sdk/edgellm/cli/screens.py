"""Pictures of devices: pure functions from what is known of them to what rich draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edgellm.cli import readings
from edgellm.cli.live import sparkline
from edgellm.cli.output import human_bytes, printable
from edgellm.cli.readings import ABSENT, STATES, celsius, decimal, optional, percent, watts
from edgellm.cli.watching import SPAN_S, History, Watched
from edgellm.v1.telemetry_pb2 import Telemetry

_STATE_STYLES = dict(zip(STATES, ("green", "yellow", "red", "bold white on red"), strict=True))
_CELLS = 10
_GAP = "  "
# A sparkline of temperature begins here, and ends at the trip point, or at 100 where there is none.
_COOL_CELSIUS, _HOT_CELSIUS = 30.0, 100.0
# Two panels beside each other from here on; what matters most is on top.
_WIDE = 100
_TWO_COLUMNS = (("governor", "heat", "compute", "memory"), ("engine", "power", "uplink"))
_ONE_COLUMN = (("governor", "heat", "engine", "power", "compute", "memory", "uplink"),)
# Title and footer, the headers of the table, and the empty lines between them.
_FRAME_LINES = 5


class _Cell:
    """What a device says goes through `printable`: it must not command the terminal."""

    def __init__(self, text: str, style: str = "") -> None:
        self.text, self.style = printable(text), style


@dataclass(frozen=True)
class _Column:
    """A column; those of the highest rank go first where there is no room."""

    title: str
    rank: int
    right: bool = True
    plot: bool = False

    def padded(self, text: str, width: int) -> str:
        return text.rjust(width) if self.right else text.ljust(width)


_COLUMNS = (
    _Column("DEVICE", 0, right=False),
    _Column("GOVERNOR", 1, right=False),
    _Column("TEMP", 2),
    _Column("MARGIN", 5),
    _Column("LAST MIN", 11, right=False, plot=True),
    _Column("POWER", 6),
    _Column("GPU", 8),
    _Column("CPU", 12),
    _Column("MEM FREE", 9),
    _Column("ENGINE", 14, right=False),
    _Column("STATE", 4, right=False),
    _Column("RUN/WAIT", 10),
    _Column("TOK/S", 3),
    _Column("LAST MIN", 13, right=False, plot=True),
    _Column("TOK/J", 7),
    _Column("KV CACHE", 15),
)


def screen(devices: Sequence[Watched], now_s: float, width: int, height: int) -> RenderableType:
    """A table of many devices, or all that one says; as large as the terminal."""
    if len(devices) == 1:
        return _detail(devices[0], now_s, width, height)
    room = max(1, height - _FRAME_LINES)
    shown = list(devices)
    if len(devices) > room:
        # Those that need somebody come first when not all can be seen; the order within is kept.
        shown = sorted(devices, key=_urgency, reverse=True)[:room]
    hidden = f"{len(devices) - len(shown)} more: enlarge the window or choose with --device. "
    hidden = hidden if len(shown) < len(devices) else ""
    footer = Text(f"{hidden}q or Ctrl-C ends.", "dim", no_wrap=True, overflow="ellipsis")
    return Group(_title(devices), Text(), *lines(shown, now_s, width), Text(), footer)


def lines(
    devices: Sequence[Watched], now_s: float, width: int | None = None, *, live: bool = True
) -> list[Text]:
    """A line of headers and one for each device, in a width; None means as wide as it takes.

    What passes with time, plots and the next try, is left out of a picture that is not `live`.
    """
    rows = [None if device.record is None else _cells(device, device.record, now_s) for device in devices]
    widths = [
        max(len(column.title), *(len(row[place].text) for row in rows if row is not None), 0)
        for place, column in enumerate(_COLUMNS)
    ]
    widths[0] = max(widths[0], *(len(printable(device.name)) for device in devices))
    shown = _fitting(widths, width, plots=live)
    headers = _GAP.join(_COLUMNS[place].padded(_COLUMNS[place].title, widths[place]) for place in shown)
    return [
        Text(headers.rstrip(), "bold", no_wrap=True, overflow="crop"),
        *(
            _silent_line(device, now_s if live else math.inf, widths[0], width)
            if row is None
            else _line(row, [(place, widths[place]) for place in shown])
            for device, row in zip(devices, rows, strict=True)
        ),
    ]


def _fitting(widths: Sequence[int], width: int | None, *, plots: bool) -> list[int]:
    """Which columns have room, the name always."""
    places = [place for place, column in enumerate(_COLUMNS) if plots or not column.plot]
    while width is not None and len(places) > 1:
        if sum(widths[place] for place in places) + len(_GAP) * (len(places) - 1) <= width:
            break
        places.remove(max(places, key=lambda place: _COLUMNS[place].rank))
    return places


def _line(row: Sequence[_Cell], places: Sequence[tuple[int, int]]) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    for number, (place, width) in enumerate(places):
        cell = row[place]
        line.append(_GAP if number else "")
        line.append(_COLUMNS[place].padded(cell.text, width), cell.style)
    return line


def _silent_line(device: Watched, now_s: float, name_width: int, width: int | None) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{printable(device.name):<{name_width}}{_GAP}")
    if not device.failure:
        return line.append("no answer yet", "dim")
    line.append(printable(device.failure), "red")
    if (wait_s := device.retry_at_s - now_s) > 0:
        line.append(f"; next try in {wait_s:.0f} s", "dim")
    if width is not None:
        line.truncate(width, overflow="ellipsis")
    return line


def _cells(device: Watched, record: Telemetry, now_s: float) -> tuple[_Cell, ...]:
    """A line, in the order of `_COLUMNS`."""
    engine, compute = record.runtime, record.compute
    state, margin = record.governor.state, optional(record.thermal, "margin_celsius")
    busy = readings.has_engine(record)
    return (
        _Cell(device.name),
        _Cell(state or ABSENT, _STATE_STYLES.get(state, "")),
        _Cell(celsius(optional(record.thermal, "max_celsius"))),
        _Cell(celsius(margin), _margin_style(margin)),
        _Cell(_heat_bars(device, record, now_s, _CELLS)),
        _Cell(watts(optional(record.power, "total_mw"))),
        _Cell(percent(optional(compute, "gpu_percent"))),
        _Cell(percent(optional(compute, "cpu_percent"))),
        _Cell(human_bytes(record.memory.available_bytes) if record.HasField("memory") else ABSENT),
        _Cell(engine.engine.rpartition(":")[2][:8] or ABSENT),
        _Cell(engine.state or ABSENT, "" if engine.state in ("serving", "none", "") else "yellow"),
        _Cell(f"{engine.running_sequences}/{engine.waiting_requests}" if busy else ABSENT),
        _Cell(decimal(engine.decode_tokens_per_s if busy else None, 1)),
        _Cell(_bars(device.tokens_per_s, now_s, _CELLS)),
        _Cell(decimal(optional(engine, "tokens_per_joule"))),
        _Cell(readings.kv_cache(record)),
    )


def _margin_style(celsius_left: float | None) -> str:
    if celsius_left is None or celsius_left > 10:
        return ""
    return "yellow" if celsius_left > 3 else "red"


def _urgency(device: Watched) -> int:
    if device.record is None:
        return len(STATES)
    state = device.record.governor.state
    return STATES.index(state) if state in STATES else 0


def _title(devices: Sequence[Watched]) -> Text:
    records = [device.record for device in devices if device.record is not None]
    facts = [f"{len(devices)} devices, {len(devices) - len(records)} without an answer"]
    facts += [
        f"{count} {state}"
        for state in reversed(STATES[1:])
        if (count := sum(record.governor.state == state for record in records))
    ]
    powers = [record.power.total_mw for record in records if record.power.HasField("total_mw")]
    facts.append(f"{sum(record.runtime.decode_tokens_per_s for record in records):.1f} tokens/s")
    facts += [f"{watts(sum(powers))}"] if powers else []
    return Text("  ·  ".join(facts), "bold", no_wrap=True, overflow="ellipsis")


def _detail(device: Watched, now_s: float, width: int, height: int) -> RenderableType:
    """Everything about one device that there is room for."""
    heading = Text(printable(f"{device.name}  ·  {device.target}"), "bold", no_wrap=True, overflow="ellipsis")
    footer = Text("q or Ctrl-C ends.", "dim", no_wrap=True, overflow="ellipsis")
    if device.record is None:
        line = _silent_line(device, now_s, len(printable(device.name)), None)
        line.no_wrap = False
        return Group(heading, Text(), line, Text(), footer)
    beside = width >= _WIDE
    panels = _panels(device, device.record, now_s, width // 2 if beside else width)
    grid = Table.grid(expand=True)
    columns = _TWO_COLUMNS if beside else _ONE_COLUMN
    for _ in columns:
        grid.add_column(ratio=1)
    stacks = [_stack([panels[title] for title in titles], height - 2) for titles in columns]
    grid.add_row(*(Group(*stack) for stack in stacks))
    if sum(map(len, stacks)) < len(panels):
        footer.plain = f"Enlarge the window to see more. {footer.plain}"
    return Group(heading, grid, footer)


def _panels(device: Watched, record: Telemetry, now_s: float, width: int) -> dict[str, Panel]:
    panels = {}
    for section in readings.sections(record):
        label = max(len(name) for name, _ in section.facts) + len(_GAP)
        facts = [(name, printable(value)) for name, value in section.facts]
        # Borders and their padding take 4.
        plot = _plot(section.title, device, record, now_s, max(1, min(width - label - 4, 60)))
        if plot.strip():
            facts.append(("last minute", plot))
        style = _STATE_STYLES.get(record.governor.state, "") if section.title == "governor" else ""
        panels[section.title] = Panel(
            _facts(facts, max(label, len("last minute") + 2), style),
            title=section.title,
            title_align="left",
            height=len(facts) + 2,
        )
    return panels


def _plot(title: str, device: Watched, record: Telemetry, now_s: float, cells: int) -> str:
    if title == "heat":
        return _heat_bars(device, record, now_s, cells)
    history = {"power": device.watts, "engine": device.tokens_per_s}.get(title)
    return "" if history is None else _bars(history, now_s, cells)


def _stack(panels: Sequence[Panel], room: int) -> list[Panel]:
    """Those that have room below each other, the first ones first."""
    shown = []
    for panel in panels:
        if (panel.height or 0) <= room:
            shown.append(panel)
            room -= panel.height or 0
    return shown


def _facts(facts: Sequence[tuple[str, str]], width: int, first_style: str) -> Text:
    """Names and values, aligned; the first value in a style."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for number, (name, value) in enumerate(facts):
        text.append("\n" if number else "")
        text.append(f"{printable(name):<{width}}", "dim").append(value, "" if number else first_style)
    return text


def _heat_bars(device: Watched, record: Telemetry, now_s: float, cells: int) -> str:
    hottest, margin = (optional(record.thermal, name) for name in ("max_celsius", "margin_celsius"))
    trip = _HOT_CELSIUS if hottest is None or margin is None else hottest + margin
    high = max(trip, _COOL_CELSIUS + 1)
    return sparkline(device.celsius.since(now_s - SPAN_S), now_s - SPAN_S, now_s, cells, _COOL_CELSIUS, high)


def _bars(history: History, now_s: float, cells: int) -> str:
    points = history.since(now_s - SPAN_S)
    high = max((value for _, value in points), default=0.0)
    return sparkline(points, now_s - SPAN_S, now_s, cells, 0.0, max(high, 1e-9))
