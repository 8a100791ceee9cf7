"""A telemetry record as Prometheus metrics, in base units: watts, hertz, ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from edgellm.v1 import telemetry_pb2
from edgellm.v1.telemetry_pb2 import Telemetry

_STATES = ("none", "starting", "serving", "draining", "restarting", "stopped")

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class Row:
    """One metric. What the record does not have gives no sample: absent is not zero."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    read: Callable[[Telemetry], Iterable[Sample]]


def _field(path: str, scale: float = 1.0) -> Callable[[Telemetry], Iterator[Sample]]:
    """Reads "part.field"."""
    part_name, name = path.split(".")

    def read(record: Telemetry) -> Iterator[Sample]:
        if not record.HasField(part_name):  # type: ignore[arg-type]
            return
        part = getattr(record, part_name)
        descriptor = part.DESCRIPTOR.fields_by_name[name]
        if not descriptor.has_presence or part.HasField(name):
            yield {}, getattr(part, name) * scale

    return read


def _zones(field: str) -> Callable[[Telemetry], Iterator[Sample]]:
    def read(record: Telemetry) -> Iterator[Sample]:
        for zone in record.thermal.zones:
            if field == "celsius" or zone.HasField(field):  # type: ignore[arg-type]
                yield {"zone": zone.name}, getattr(zone, field)

    return read


def _rails(field: str) -> Callable[[Telemetry], Iterator[Sample]]:
    def read(record: Telemetry) -> Iterator[Sample]:
        for rail in record.power.rails:
            if field == "power_mw" or rail.HasField(field):  # type: ignore[arg-type]
                yield {"rail": rail.name}, getattr(rail, field) / 1000

    return read


def _over_current(record: Telemetry) -> Iterator[Sample]:
    for counted in record.power.over_current:
        yield {"kind": counted.kind}, counted.events


def _power_mode(record: Telemetry) -> Iterator[Sample]:
    if record.power.mode:
        yield {"mode": record.power.mode}, 1


def _engine(record: Telemetry) -> Iterator[Sample]:
    if record.runtime.engine:
        yield {"digest": record.runtime.engine}, 1


def _state(record: Telemetry) -> Iterator[Sample]:
    if record.HasField("runtime"):
        for state in _STATES:
            yield {"state": state}, float(state == record.runtime.state)


def _time(record: Telemetry) -> Iterator[Sample]:
    if record.HasField("time"):
        yield {}, record.time.ToNanoseconds() / 1e9


TABLE = (
    Row("edgellm_telemetry_time_seconds", "gauge", "When the record was taken, Unix time.", _time),
    Row("edgellm_temperature_celsius", "gauge", "Temperature of a thermal zone.", _zones("celsius")),
    Row(
        "edgellm_temperature_passive_celsius",
        "gauge",
        "Where the board throttles.",
        _zones("passive_celsius"),
    ),
    Row("edgellm_temperature_critical_celsius", "gauge", "Where it turns off.", _zones("critical_celsius")),
    Row("edgellm_temperature_max_celsius", "gauge", "Hottest zone.", _field("thermal.max_celsius")),
    Row("edgellm_thermal_margin_celsius", "gauge", "Way to throttling.", _field("thermal.margin_celsius")),
    Row("edgellm_power_watts", "gauge", "Input of the whole module.", _field("power.total_mw", 1e-3)),
    Row("edgellm_rail_power_watts", "gauge", "Power of a rail.", _rails("power_mw")),
    Row("edgellm_rail_voltage_volts", "gauge", "Voltage of a rail.", _rails("voltage_mv")),
    Row("edgellm_rail_current_amperes", "gauge", "Current of a rail.", _rails("current_ma")),
    Row("edgellm_over_current_events", "counter", "Over-current events since boot.", _over_current),
    Row("edgellm_power_mode_info", "gauge", "Power mode by name.", _power_mode),
    Row("edgellm_cpu_ratio", "gauge", "Load of all cores.", _field("compute.cpu_percent", 1e-2)),
    Row("edgellm_cpu_hertz", "gauge", "Clock of the cores.", _field("compute.cpu_mhz", 1e6)),
    Row("edgellm_gpu_ratio", "gauge", "Load of the GPU.", _field("compute.gpu_percent", 1e-2)),
    Row("edgellm_gpu_hertz", "gauge", "Clock of the GPU.", _field("compute.gpu_mhz", 1e6)),
    Row("edgellm_gpu_max_hertz", "gauge", "Highest clock of the GPU.", _field("compute.gpu_max_mhz", 1e6)),
    Row("edgellm_memory_total_bytes", "gauge", "Memory of the board.", _field("memory.total_bytes")),
    Row("edgellm_memory_available_bytes", "gauge", "MemAvailable.", _field("memory.available_bytes")),
    Row("edgellm_swap_total_bytes", "gauge", "Swap space.", _field("memory.swap_total_bytes")),
    Row("edgellm_swap_used_bytes", "gauge", "Swap space in use.", _field("memory.swap_used_bytes")),
    Row(
        "edgellm_memory_pressure_ratio",
        "gauge",
        "Share of 10 s in which some task waited for memory (PSI).",
        _field("memory.pressure_some_percent", 1e-2),
    ),
    Row("edgellm_engine_info", "gauge", "The active engine by digest.", _engine),
    Row("edgellm_engine_state", "gauge", "1 for the state that the engine is in.", _state),
    Row("edgellm_prefill_tokens_per_second", "gauge", "Prompts.", _field("runtime.prefill_tokens_per_s")),
    Row("edgellm_decode_tokens_per_second", "gauge", "Answers.", _field("runtime.decode_tokens_per_s")),
    Row("edgellm_running_sequences", "gauge", "Requests that run.", _field("runtime.running_sequences")),
    Row("edgellm_waiting_requests", "gauge", "Requests that wait.", _field("runtime.waiting_requests")),
    Row("edgellm_kv_used_bytes", "gauge", "KV cache in use.", _field("runtime.kv_used_bytes")),
    Row("edgellm_kv_cached_bytes", "gauge", "Of it, kept as prefixes.", _field("runtime.kv_cached_bytes")),
    Row("edgellm_kv_promised_bytes", "gauge", "KV cache promised.", _field("runtime.kv_promised_bytes")),
    Row("edgellm_kv_bound_bytes", "gauge", "KV cache allowed.", _field("runtime.kv_bound_bytes")),
    Row("edgellm_requests", "counter", "Requests taken.", _field("runtime.requests_total")),
    Row(
        "edgellm_generated_tokens", "counter", "Tokens of answers.", _field("runtime.generated_tokens_total")
    ),
    Row(
        "edgellm_cached_tokens",
        "counter",
        "Tokens of prompts that the KV cache had.",
        _field("runtime.cached_tokens_total"),
    ),
    Row("edgellm_preemptions", "counter", "Sequences put back.", _field("runtime.preemptions_total")),
    Row("edgellm_draft_tokens", "counter", "Tokens guessed.", _field("runtime.draft_tokens_total")),
    Row(
        "edgellm_accepted_draft_tokens",
        "counter",
        "Tokens guessed right.",
        _field("runtime.accepted_draft_tokens_total"),
    ),
    Row("edgellm_worker_restarts", "counter", "Restarts.", _field("runtime.worker_restarts_total")),
    Row("edgellm_worker_rss_bytes", "gauge", "Memory of the worker.", _field("runtime.worker_rss_bytes")),
    Row("edgellm_load_seconds", "gauge", "What loading the engine took.", _field("runtime.load_s")),
)


def render(record: Telemetry | None, accept: str = "") -> tuple[bytes, str]:
    """The metrics and their media type: OpenMetrics or Prometheus text, whichever `accept` prefers."""
    encode, media_type = choose_encoder(accept)
    return encode(_Once(record or telemetry_pb2.Telemetry())), media_type


class _Once:
    """One record as a registry, which is what encoders take."""

    def __init__(self, record: Telemetry) -> None:
        self._record = record

    def collect(self) -> Iterator[Metric]:
        for row in TABLE:
            samples = list(row.read(self._record))
            if not samples:
                continue
            # All samples of a row have the same labels.
            names = list(samples[0][0])
            kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
            family = kind(row.name, row.help, labels=names)
            for labels, value in samples:
                family.add_metric(list(labels.values()), value)
            yield family
