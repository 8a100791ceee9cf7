"""What the governor reads from a telemetry record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgellm.v1 import telemetry_pb2


@dataclass(frozen=True)
class Observation:
    """One moment; what the board does not tell is None."""

    at_s: float
    """Monotonic."""
    margin_celsius: float | None = None
    """How far the zone nearest to its trip point is away from it."""
    power_mw: float | None = None
    over_current: Mapping[str, int] = field(default_factory=dict)
    """Events since boot, by kind."""
    available_bytes: int | None = None
    stalled_percent: float = 0.0
    busy: bool = True
    """The engine had work: only then do the figures say what its pace leads to."""


def observe(record: telemetry_pb2.Telemetry, trip_celsius: float | None = None) -> Observation:
    """Takes it from a record; `trip_celsius` counts beside the trip points that the board tells."""
    thermal, power, memory, runtime = record.thermal, record.power, record.memory, record.runtime
    margins = [thermal.margin_celsius] if thermal.HasField("margin_celsius") else []
    total_mw = power.total_mw if power.HasField("total_mw") else math.nan
    if trip_celsius is not None and thermal.HasField("max_celsius"):
        margins.append(trip_celsius - thermal.max_celsius)
    return Observation(
        at_s=record.monotonic_ns / 1e9,
        margin_celsius=min(filter(math.isfinite, margins), default=None),
        power_mw=total_mw if math.isfinite(total_mw) else None,
        over_current={counter.kind: counter.events for counter in power.over_current},
        available_bytes=memory.available_bytes if record.HasField("memory") else None,
        stalled_percent=memory.pressure_some_percent,
        busy=not record.HasField("runtime") or runtime.running_sequences + runtime.waiting_requests > 0,
    )
