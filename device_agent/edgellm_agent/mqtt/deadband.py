"""Decides which telemetry is worth a message: what moved by more than its deadband, or was long silent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from google.protobuf.message import Message

from edgellm.fleet.topics import TELEMETRY
from edgellm.v1 import telemetry_pb2

# By how much each metric may move unsaid, in its own unit: 0 tells every change, infinity none. What has no
# line here (counters that only grow, shares of a total that is told) is never the reason for a message but
# travels with the next one. Texts and truth values (states, modes, reasons) are told at every change.
DEFAULTS: dict[str, float] = {
    # °C. A Jetson's sensors have steps of about 0.03 to 0.5 °C and as much noise.
    "thermal.max_celsius": 1.0,
    "thermal.margin_celsius": 1.0,
    "thermal.zones.celsius": 2.0,
    "thermal.zones.passive_celsius": 0.0,
    "thermal.zones.critical_celsius": 0.0,
    # mW, mV, mA. An idle module takes about 5 W and wavers by some percent.
    "power.total_mw": 500.0,
    "power.rails.power_mw": 500.0,
    "power.rails.voltage_mv": 250.0,
    "power.rails.current_ma": 200.0,
    "power.over_current.events": 0.0,
    # %, MHz. Load and clocks jump from second to second; only a change of regime is news.
    "compute.cpu_percent": 20.0,
    "compute.cpu_mhz": 500.0,
    "compute.gpu_percent": 25.0,
    "compute.gpu_mhz": 300.0,
    "compute.gpu_max_mhz": 0.0,
    # Bytes, %.
    "memory.total_bytes": 0.0,
    "memory.available_bytes": 64.0 * 2**20,
    "memory.swap_total_bytes": 0.0,
    "memory.swap_used_bytes": 32.0 * 2**20,
    "memory.pressure_some_percent": 5.0,
    # Tokens/s, sequences, bytes, s.
    "runtime.prefill_tokens_per_s": 100.0,
    "runtime.decode_tokens_per_s": 2.0,
    "runtime.running_sequences": 1.0,
    "runtime.waiting_requests": 2.0,
    "runtime.kv_used_bytes": 64.0 * 2**20,
    "runtime.kv_promised_bytes": 64.0 * 2**20,
    "runtime.kv_cached_bytes": 64.0 * 2**20,
    "runtime.kv_bound_bytes": 0.0,
    "runtime.worker_rss_bytes": 64.0 * 2**20,
    "runtime.worker_restarts_total": 0.0,
    "runtime.failed_requests_total": 0.0,
    "runtime.load_s": 0.0,
    "runtime.time_to_first_token.p50_s": 0.25,
    "runtime.time_to_first_token.p95_s": 0.5,
    "runtime.time_to_first_token.p99_s": math.inf,
    "runtime.inter_token_latency.p50_s": 0.01,
    "runtime.inter_token_latency.p95_s": 0.05,
    "runtime.inter_token_latency.p99_s": math.inf,
    "runtime.tokens_per_joule": 0.2,
    "runtime.joules_per_request": 10.0,
    "governor.pace": 0.1,
    "governor.max_sequences": 0.0,
    "governor.slope_celsius_per_s": 0.25,
    "governor.power_budget_mw": 0.0,
    "uplink.dropped_telemetry_total": 0.0,
    "uplink.connections_total": 0.0,
}
# What a metric without a line may do unsaid: everything.
_UNWATCHED = math.inf
# What tells the entries of a list apart.
_NAMES = ("name", "kind")
_Value: TypeAlias = float | str | bool
# A metric and, for one in a list, which entry: ("power.rails.power_mw", "VDD_IN").
_Key: TypeAlias = tuple[str, str]


class Deadband:
    """Remembers what each telemetry topic said last."""

    def __init__(self, overrides: Mapping[str, float], *, max_silence_s: float) -> None:
        self._limits = {**DEFAULTS, **overrides}
        self._max_silence_ns = round(max_silence_s * 1e9)
        self._last: dict[str, tuple[int, dict[_Key, _Value]]] = {}

    def reset(self) -> None:
        """Forget what was said: a new connection begins with all topics."""
        self._last.clear()

    def take(self, record: telemetry_pb2.Telemetry) -> list[str]:
        """The topics (`TELEMETRY`) that this record is worth a message on; they count as said."""
        return [name for name in TELEMETRY if self._take(name, record)]

    def _take(self, name: str, record: telemetry_pb2.Telemetry) -> bool:
        parts = [part for part in TELEMETRY[name] if record.HasField(part)]  # type: ignore[arg-type]
        if not parts:
            return False
        values = {key: value for part in parts for key, value in _leaves(part, "", getattr(record, part))}
        if name in self._last:
            said_ns, said = self._last[name]
            if record.monotonic_ns - said_ns < self._max_silence_ns and not self._moved(said, values):
                return False
        self._last[name] = (record.monotonic_ns, values)
        return True

    def _moved(self, said: dict[_Key, _Value], now: dict[_Key, _Value]) -> bool:
        return any(self._differs(key[0], said.get(key), now.get(key)) for key in said.keys() | now.keys())

    def _differs(self, metric: str, said: _Value | None, now: _Value | None) -> bool:
        limit = self._limits.get(metric, _UNWATCHED)
        if isinstance(said, float) and isinstance(now, float):
            return abs(now - said) > limit
        if isinstance(said, float) or isinstance(now, float):
            # A metric that came or went is a change, too.
            return limit < _UNWATCHED
        return said != now


def _leaves(path: str, entry: str, message: Message) -> Iterator[tuple[_Key, _Value]]:
    """Every scalar below a message, numbers as floats; a field that is absent gives none."""
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value: Any = getattr(message, field.name)
        inner = f"{path}.{field.name}"
        if isinstance(value, Message):
            yield from _leaves(inner, entry, value)
        elif isinstance(value, (str, bool)):
            yield (inner, entry), value
        elif isinstance(value, (int, float)):
            yield (inner, entry), float(value)
        else:
            yield from _entries(inner, value)


def _entries(path: str, values: Sequence[Any]) -> Iterator[tuple[_Key, _Value]]:
    if all(isinstance(value, str) for value in values):
        yield (path, ""), " ".join(values)
        return
    for index, value in enumerate(values):
        entry = next((getattr(value, name) for name in _NAMES if hasattr(value, name)), str(index))
        yield from _leaves(path, entry, value)
