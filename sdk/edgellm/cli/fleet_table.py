"""How a fleet looks: rows and words for people, objects for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from edgellm.bundle.digest import is_digest, short
from edgellm.cli.output import human_bytes, printable
from edgellm.fleet.queries import DeviceView, HourSummary
from edgellm.fleet.topics import encode
from edgellm.json_form import to_fields
from edgellm.v1 import fleet_pb2

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = (
    "DEVICE", "GROUP", "STATE", "ENGINE", "TEMP", "MARGIN", "GOVERNOR", "POWER", "TOK/S", "TOK/J",
    "LAST EVENT", "SEEN", "SKEW",
)  # fmt: skip
_STYLES = {0: "bold red", 1: "red", 2: "magenta", 3: "yellow", 4: "cyan"}


def cells(view: DeviceView, now_ns: int) -> tuple[str, ...]:
    """One line of the table; what is not known is empty."""
    thermal, power, runtime = view.telemetry.thermal, view.telemetry.power, view.telemetry.runtime
    fresh = view.online
    row = (
        view.topics.device,
        view.topics.group,
        state_words(view, now_ns),
        engine_words(view),
        f"{thermal.max_celsius:.1f} °C" if fresh and thermal.HasField("max_celsius") else "",
        f"{thermal.margin_celsius:.1f} °C" if fresh and thermal.HasField("margin_celsius") else "",
        governor_words(view) if fresh else "",
        f"{power.total_mw / 1000:.1f} W" if fresh and power.HasField("total_mw") else "",
        f"{runtime.decode_tokens_per_s:.1f}" if fresh and view.telemetry.HasField("runtime") else "",
        f"{runtime.tokens_per_joule:.2f}" if fresh and runtime.HasField("tokens_per_joule") else "",
        last_event_words(view, now_ns),
        age(now_ns - view.last_seen_ns) if view.last_seen_ns else "never",
        skew_words(view),
    )
    return tuple(printable(cell) for cell in row)


def rich_table(views: Sequence[DeviceView], now_ns: int, title: str) -> Table:
    """The fleet, worst first, coloured by trouble."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in HEADERS:
        right = name in {"TEMP", "MARGIN", "POWER", "TOK/S", "TOK/J", "SEEN", "SKEW"}
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "LAST EVENT")
    for view in worst_first(views, now_ns):
        style = _STYLES.get(view.rank(now_ns)[0], "")
        # As Text, so that a name in brackets is no markup.
        table.add_row(*(Text(cell, style=style) for cell in cells(view, now_ns)))
    return table


def worst_first(views: Sequence[DeviceView], now_ns: int) -> list[DeviceView]:
    """In the order in which somebody should look at them."""
    return sorted(views, key=lambda view: view.rank(now_ns))


def summary(views: Sequence[DeviceView], now_ns: int) -> str:
    """The fleet in one line."""
    online = sum(view.online for view in views)
    states = [view.telemetry.governor.state for view in views if view.online]
    parts = [f"{len(views)} devices", f"{online} online"]
    parts += [f"{states.count(name)} {name}" for name in ("CRITICAL", "HOT", "WARM") if name in states]
    if silent := sum(view.silent(now_ns) for view in views):
        parts.append(f"{silent} silent")
    if converging := sum(view.converging for view in views):
        parts.append(f"{converging} not converged")
    return ", ".join(parts)


def state_words(view: DeviceView, now_ns: int) -> str:
    """Whether it is there."""
    if view.state is None:
        return "unknown"
    if not view.online:
        return "offline"
    return "silent" if view.silent(now_ns) else "online"


def engine_words(view: DeviceView) -> str:
    """What runs, and what is to run if that is something else."""
    report = view.reported
    active = report.active_engine if report is not None else view.state.active_engine if view.state else ""
    name = (report.active_name if report is not None else "") or engine_name(active)
    if not view.converging or view.desired is None:
        return name
    phase = report.phase if report is not None and report.phase else "WAITING"
    if report is None or report.observed_generation < view.desired.generation:
        phase = "WAITING"
    share = f" {100 * report.fetched_bytes // report.total_bytes} %" if report and report.total_bytes else ""
    wanted = "" if view.desired.engine == active else f" → {engine_name(view.desired.engine)}"
    return f"{name}{wanted} {phase}{share if phase == 'FETCHING' else ''}".strip()


def engine_name(digest: str) -> str:
    """A digest that is read at a glance."""
    if not digest:
        return "none"
    return short(digest) if is_digest(digest) else digest[:12]


def governor_words(view: DeviceView) -> str:
    """The governor's state, and why."""
    governor = view.telemetry.governor
    return f"{governor.state}: {', '.join(governor.reasons)}" if governor.reasons else governor.state


def last_event_words(view: DeviceView, now_ns: int) -> str:
    """What happened last, and how long ago it was heard."""
    if view.last_event is None:
        return ""
    return f"{event_words(view.last_event)} ({age(now_ns - view.last_event_ns)})"


def event_words(event: fleet_pb2.Event) -> str:
    """An event in a few words."""
    kind = event.WhichOneof("data") or ""
    words, why = _WORDS[kind](event) if kind in _WORDS else (event.type, "")
    return f"{words}: {why}" if why else words


def _governor(event: fleet_pb2.Event) -> tuple[str, str]:
    change = event.governor
    return f"governor {change.before} → {change.now.state}", ", ".join(change.now.reasons)


def _engine(event: fleet_pb2.Event) -> tuple[str, str]:
    return f"engine {event.engine.what} {engine_name(event.engine.engine)}", event.engine.error


def _worker(event: fleet_pb2.Event) -> tuple[str, str]:
    return "worker ended", event.worker.reason + (", out of memory" if event.worker.out_of_memory else "")


def _state(event: fleet_pb2.Event) -> tuple[str, str]:
    return f"{'online' if event.state.online else 'offline'}, session {event.state.session}", ""


def _reported(event: fleet_pb2.Event) -> tuple[str, str]:
    report = event.reported
    return f"reported {report.phase or 'NONE'} of generation {report.observed_generation}", report.error


def _desired(event: fleet_pb2.Event) -> tuple[str, str]:
    return f"desired {engine_name(event.desired.engine)}, generation {event.desired.generation}", ""


# What happened, and why, for each kind of data.
_WORDS: dict[str, Callable[[fleet_pb2.Event], tuple[str, str]]] = {
    "governor": _governor,
    "engine": _engine,
    "worker": _worker,
    "state": _state,
    "reported": _reported,
    "desired": _desired,
}


def skew_words(view: DeviceView) -> str:
    """How far its clock is behind (-) or ahead (+)."""
    if view.clock_skew_s is None:
        return ""
    return ("-" if view.clock_skew_s > 0 else "+") + age(round(abs(view.clock_skew_s) * 1e9))


def age(nanoseconds: int) -> str:
    """A duration at a glance."""
    seconds = max(0, nanoseconds) / 1e9
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def clock(nanoseconds: int) -> str:
    """A time in UTC."""
    return f"{datetime.fromtimestamp(nanoseconds / 1e9, timezone.utc):%Y-%m-%d %H:%M:%S}"


def sparkline(values: Sequence[float | None]) -> str:
    """Values as bars, from their least to their greatest; a gap where there is none."""
    from edgellm.cli.live import bars

    known = [value for value in values if value is not None]
    return bars(values, min(known), max(known)) if known else ""


def hour_cells(hour: HourSummary) -> tuple[str, ...]:
    """One line of a device's telemetry: least, mean and greatest."""
    power = None if hour.power_mw is None else tuple(value / 1000 for value in hour.power_mw)
    joule = "" if hour.tokens_per_joule is None else f"{hour.tokens_per_joule:.2f}"
    return (
        clock(hour.hour_ns)[:13] + "h", str(hour.records), _three(hour.celsius), _three(power),
        _three(hour.tokens_per_s), joule,
    )  # fmt: skip


def facts(view: DeviceView, now_ns: int) -> list[tuple[str, str]]:
    """One device, a fact a line."""
    named = dict(zip(HEADERS, cells(view, now_ns), strict=True))
    telemetry = view.telemetry
    pairs = [(name.lower(), value) for name, value in named.items() if value]
    if view.state is not None:
        pairs.append(("agent", f"{view.state.agent_version} on {view.state.profile or 'an unknown board'}"))
        pairs.append(("session", str(view.state.session)))
    if telemetry.HasField("memory"):
        memory = telemetry.memory
        pairs.append(
            (
                "memory",
                f"{human_bytes(memory.available_bytes)} of {human_bytes(memory.total_bytes)} available",
            )
        )
    if view.desired is not None:
        pairs.append(("desired", f"{view.desired.engine}, generation {view.desired.generation}"))
    if view.reported is not None and view.reported.error:
        pairs.append(("error", view.reported.error))
    if telemetry.HasField("uplink"):
        uplink = telemetry.uplink
        pairs.append(("outbox", f"{uplink.queued_events} events, {uplink.queued_telemetry} records"))
    return pairs


def as_json(view: DeviceView, now_ns: int) -> dict[str, Any]:
    """One device for programs."""
    return {
        "tenant": view.topics.tenant,
        "group": view.topics.group,
        "device": view.topics.device,
        "online": view.online,
        "silent": view.silent(now_ns),
        "last_seen_at": iso(view.last_seen_ns),
        "clock_skew_s": view.skew_s,
        "state": message_fields(view.state),
        "desired": message_fields(view.desired),
        "reported": message_fields(view.reported),
        "telemetry": message_fields(view.telemetry if view.telemetry_ns else None),
        "telemetry_at": iso(view.telemetry_ns),
        "last_event": event_fields(view.last_event) if view.last_event is not None else None,
        "last_event_at": iso(view.last_event_ns),
    }


def event_fields(event: fleet_pb2.Event) -> Any:
    """An event as it travels in JSON."""
    return json.loads(encode(event, "json"))


def iso(nanoseconds: int) -> str | None:
    """A time for programs; None for none."""
    return datetime.fromtimestamp(nanoseconds / 1e9, timezone.utc).isoformat() if nanoseconds else None


def message_fields(message: Any) -> Any:
    """A message for programs; None stays None."""
    return None if message is None else to_fields(message)


def _three(values: tuple[float, ...] | None) -> str:
    return "" if values is None else " / ".join(f"{value:.1f}" for value in values)
