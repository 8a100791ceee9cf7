"""How the figures of a telemetry record are written for people; an absent one is a dash, never a zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgellm.cli.output import human_bytes, printable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from edgellm.v1.telemetry_pb2 import Percentiles, Telemetry, ThermalZone

ABSENT = "–"  # noqa: RUF001 - a dash for a gap, not a minus
HEADERS = ("UTC", "GOVERNOR", "TEMP", "MARGIN", "POWER", "GPU", "MEM FREE", "TOK/S", "TOK/J")
# In the order of how bad they are.
STATES = ("NOMINAL", "WARM", "HOT", "CRITICAL")


@dataclass(frozen=True)
class Section:
    """Figures that belong together, each with its name."""

    title: str
    facts: tuple[tuple[str, str], ...]


def sections(record: Telemetry) -> tuple[Section, ...]:
    """All that a record says."""
    return (
        Section("governor", governor_facts(record)),
        Section("heat", heat_facts(record)),
        Section("power", power_facts(record)),
        Section("compute", compute_facts(record)),
        Section("memory", memory_facts(record)),
        Section("engine", engine_facts(record)),
        Section("uplink", uplink_facts(record)),
    )


def lines(name: str, record: Telemetry) -> list[str]:
    """A record on many lines: section, figure, value."""
    taken = record.time.ToDatetime()
    text = [printable(f"{name}, record {record.sequence} of {taken:%Y-%m-%d %H:%M:%S} UTC")]
    found = sections(record)
    width = max(len(figure) for section in found for figure, _ in section.facts)
    for section in found:
        text.append("")
        for number, (figure, value) in enumerate(section.facts):
            title = section.title if number == 0 else ""
            text.append(printable(f"{title:<8}  {figure:<{width}}  {value}"))
    return text


def row(record: Telemetry) -> list[str]:
    """A record on one line, below `HEADERS`."""
    engine = record.runtime
    return [
        f"{record.time.ToDatetime():%H:%M:%S}",
        printable(record.governor.state) or ABSENT,
        celsius(optional(record.thermal, "max_celsius")),
        celsius(optional(record.thermal, "margin_celsius")),
        watts(optional(record.power, "total_mw")),
        percent(optional(record.compute, "gpu_percent")),
        human_bytes(record.memory.available_bytes) if record.HasField("memory") else ABSENT,
        decimal(engine.decode_tokens_per_s if has_engine(record) else None, 1),
        decimal(optional(engine, "tokens_per_joule")),
    ]


def governor_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """How much work is admitted, and why not more."""
    governor = record.governor
    limits = [
        f"{100 * governor.pace:.0f} % of the time" if governor.pace else "",
        f"{governor.max_sequences} at once" if governor.max_sequences else "",
        "new requests are refused" if governor.refusing else "",
    ]
    return (
        ("state", governor.state or ABSENT),
        ("reasons", ", ".join(governor.reasons) or ABSENT),
        ("admits", ", ".join(filter(None, limits)) or ABSENT),
    )


def heat_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """The hottest zone, the way to the trip point, and each zone."""
    slope = optional(record.governor, "slope_celsius_per_s")
    return (
        ("hottest", celsius(optional(record.thermal, "max_celsius"))),
        ("to trip point", celsius(optional(record.thermal, "margin_celsius"))),
        ("rises by", ABSENT if slope is None else f"{slope:+.2f} °C/s"),
        *((zone.name, _zone(zone)) for zone in record.thermal.zones),
    )


def power_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """The module's input, its rails and what it was cut for."""
    power, energy_j = record.power, optional(record.power, "energy_total_j")
    counts = [f"{item.kind.replace('_', ' ')} {item.events}" for item in power.over_current]
    return (
        ("module", watts(optional(power, "total_mw"))),
        ("budget", watts(optional(record.governor, "power_budget_mw"))),
        ("mode", power.mode or ABSENT),
        ("since start", ABSENT if energy_j is None else f"{energy_j / 3600:.2f} Wh"),
        *((rail.name, watts(rail.power_mw)) for rail in power.rails),
        ("over-current", ", ".join(counts) or ABSENT),
    )


def compute_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """How busy and how fast the processors are."""
    compute = record.compute
    most = optional(compute, "gpu_max_mhz")
    gpu = _speed(optional(compute, "gpu_percent"), optional(compute, "gpu_mhz"))
    return (
        ("CPU", _speed(optional(compute, "cpu_percent"), optional(compute, "cpu_mhz"))),
        ("GPU", gpu if most is None else f"{gpu} of {megahertz(most)}"),
    )


def memory_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """What the board has left, and who waits for it."""
    memory = record.memory
    used, total = optional(memory, "swap_used_bytes"), optional(memory, "swap_total_bytes")
    available = f"{human_bytes(memory.available_bytes)} of {human_bytes(memory.total_bytes)}"
    swap = (
        ABSENT if used is None or total is None else f"{human_bytes(int(used))} of {human_bytes(int(total))}"
    )
    return (
        ("available", available if record.HasField("memory") else ABSENT),
        ("swap used", swap),
        ("tasks waited", percent(optional(memory, "pressure_some_percent"))),
    )


def engine_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """What the engine does, how fast, and what a token costs."""
    engine = record.runtime
    if not has_engine(record):
        return (("state", engine.state or ABSENT),)
    ended = f"{engine.finished_requests_total} done, {engine.failed_requests_total} failed"
    rss_bytes, load_s = optional(engine, "worker_rss_bytes"), optional(engine, "load_s")
    worker = [
        "" if rss_bytes is None else f"{human_bytes(int(rss_bytes))} resident",
        "" if load_s is None else f"loaded in {load_s:.1f} s",
        f"{engine.worker_restarts_total} restarts",
    ]
    return (
        ("state", engine.state),
        ("digest", engine.engine or ABSENT),
        ("requests", f"{engine.running_sequences} running, {engine.waiting_requests} waiting; {ended}"),
        ("tokens/s", f"{engine.decode_tokens_per_s:.1f} decode, {engine.prefill_tokens_per_s:.1f} prefill"),
        ("first token", _percentiles(record, "time_to_first_token")),
        ("next token", _percentiles(record, "inter_token_latency")),
        ("tokens/J", decimal(optional(engine, "tokens_per_joule"))),
        ("J/request", decimal(optional(engine, "joules_per_request"), 1)),
        ("KV cache", kv_cache(record)),
        ("worker", ", ".join(filter(None, worker))),
    )


def uplink_facts(record: Telemetry) -> tuple[tuple[str, str], ...]:
    """The way to the broker, and what waits for it."""
    if not record.HasField("uplink"):
        return (("broker", ABSENT),)
    uplink = record.uplink
    waiting = f"{uplink.queued_events} events, {uplink.queued_telemetry} records"
    return (
        ("broker", "connected" if uplink.connected else "not connected"),
        ("waiting", f"{waiting}, {human_bytes(uplink.queued_bytes)}"),
        ("dropped", f"{uplink.dropped_telemetry_total} records"),
    )


def has_engine(record: Telemetry) -> bool:
    """Whether there are figures of an engine."""
    return record.runtime.state not in ("", "none")


def kv_cache(record: Telemetry) -> str:
    """Bytes used and their bound."""
    used, bound = record.runtime.kv_used_bytes, record.runtime.kv_bound_bytes
    return f"{human_bytes(used)} of {human_bytes(bound)}" if bound else ABSENT


def optional(message: Message, field: str) -> float | None:
    """A field's number; None if it is absent."""
    return getattr(message, field) if message.HasField(field) else None


def decimal(value: float | None, digits: int = 2) -> str:
    """A plain number."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def celsius(value: float | None) -> str:
    """A temperature, or a distance between two."""
    return ABSENT if value is None else f"{value:.1f} °C"


def watts(milliwatts: float | None) -> str:
    """A power."""
    return ABSENT if milliwatts is None else f"{milliwatts / 1000:.1f} W"


def percent(value: float | None) -> str:
    """A share, 0 to 100."""
    return ABSENT if value is None else f"{value:.0f} %"


def megahertz(value: float | None) -> str:
    """A clock."""
    return ABSENT if value is None else f"{value:.0f} MHz"


def seconds(value: float) -> str:
    """A duration, in milliseconds below a second."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _speed(share: float | None, mhz: float | None) -> str:
    return percent(share) if mhz is None else f"{percent(share)} at {megahertz(mhz)}"


def _zone(zone: ThermalZone) -> str:
    trips = [
        f"{name} at {value:g}"
        for name, value in (
            ("throttles", optional(zone, "passive_celsius")),
            ("off", optional(zone, "critical_celsius")),
        )
        if value is not None
    ]
    return f"{celsius(zone.celsius)}{'; ' if trips else ''}{', '.join(trips)}"


def _percentiles(record: Telemetry, field: str) -> str:
    """Of a latency of the last minute."""
    values: Percentiles = getattr(record.runtime, field)
    if not values.count:
        return ABSENT
    named = (("p50", values.p50_s), ("p95", values.p95_s), ("p99", values.p99_s))
    return ", ".join(f"{name} {seconds(value)}" for name, value in named)
