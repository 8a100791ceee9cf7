"""A telemetry record as Prometheus metrics, in base units: watts, hertz, ratios; and histograms beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from google.protobuf.message import Message
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from edgellm.v1 import telemetry_pb2
from edgellm.v1.telemetry_pb2 import Telemetry

if TYPE_CHECKING:
    from edgellm_agent.engine.figures import Histogram, Totals

_STATES = ("none", "starting", "serving", "draining", "restarting", "stopped")
_GOVERNOR_STATES = ("NOMINAL", "WARM", "HOT", "CRITICAL")
_QUANTILES = (("0.5", "p50_s"), ("0.95", "p95_s"), ("0.99", "p99_s"))
_REASONS = ("temperature", "power", "over_current", "memory")

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class Row:
    """One metric. What the record does not have gives no sample: absent is not zero."""

    name: str
    kind: Literal["gauge", "counter", "summary"]
    help: str
    read: Callable[[Telemetry], Iterable[Sample]]


def _field(path: str, scale: float = 1.0) -> Callable[[Telemetry], Iterator[Sample]]:
    """Reads "part.field"; a part may have parts."""
    *part_names, name = path.split(".")

    def read(record: Telemetry) -> Iterator[Sample]:
        part: Message = record
        for part_name in part_names:
            if not part.HasField(part_name):
                return
            part = getattr(part, part_name)
        if not part.DESCRIPTOR.fields_by_name[name].has_presence or part.HasField(name):
            yield {}, getattr(part, name) * scale

    return read


def _percentiles(name: str) -> Callable[[Telemetry], Iterator[Sample]]:
    def read(record: Telemetry) -> Iterator[Sample]:
        if record.runtime.HasField(name):  # type: ignore[arg-type]
            figures = getattr(record.runtime, name)
            for quantile, percentile in _QUANTILES:
                yield {"quantile": quantile}, getattr(figures, percentile)

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


def _governor_state(record: Telemetry) -> Iterator[Sample]:
    if record.HasField("governor"):
        for state in _GOVERNOR_STATES:
            yield {"state": state}, float(state == record.governor.state)


def _governor_reasons(record: Telemetry) -> Iterator[Sample]:
    if record.HasField("governor"):
        for reason in _REASONS:
            yield {"reason": reason}, float(reason in record.governor.reasons)


def _time(record: Telemetry) -> Iterator[Sample]:
    if record.HasField("time"):
        yield {}, record.time.ToNanoseconds() / 1e9


TABLE = (
    Row("edgellm_telemetry_timestamp_seconds", "gauge", "When the record was taken, Unix time.", _time),
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
    Row("edgellm_energy_joules", "counter", "Energy that the module took.", _field("power.energy_total_j")),
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
    Row("edgellm_finished_requests", "counter", "Whole answers.", _field("runtime.finished_requests_total")),
    Row(
        "edgellm_failed_requests",
        "counter",
        "Requests without a whole answer that their client did not cancel.",
        _field("runtime.failed_requests_total"),
    ),
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
    Row("edgellm_worker_restarts", "counter", "Of the worker.", _field("runtime.worker_restarts_total")),
    Row("edgellm_worker_rss_bytes", "gauge", "Memory of the worker.", _field("runtime.worker_rss_bytes")),
    Row("edgellm_load_seconds", "gauge", "What loading the engine took.", _field("runtime.load_s")),
    # Not the histograms' names: of the last minute, and without sum and count, which would be of all time.
    Row(
        "edgellm_recent_time_to_first_token_seconds",
        "summary",
        "From the request to the first token, over the last minute.",
        _percentiles("time_to_first_token"),
    ),
    Row(
        "edgellm_recent_first_tokens",
        "gauge",
        "How many were measured for it.",
        _field("runtime.time_to_first_token.count"),
    ),
    Row(
        "edgellm_recent_inter_token_latency_seconds",
        "summary",
        "From one token of an answer to the next, over the last minute.",
        _percentiles("inter_token_latency"),
    ),
    Row(
        "edgellm_recent_inter_token_gaps",
        "gauge",
        "How many were measured for it.",
        _field("runtime.inter_token_latency.count"),
    ),
    Row(
        "edgellm_tokens_per_joule",
        "gauge",
        "Generated tokens for each joule of the module, over the last minute.",
        _field("runtime.tokens_per_joule"),
    ),
    Row(
        "edgellm_joules_per_request",
        "gauge",
        "Joules of the module for each whole answer, over the last minute.",
        _field("runtime.joules_per_request"),
    ),
    Row("edgellm_governor_state", "gauge", "1 for the state that the governor is in.", _governor_state),
    Row("edgellm_governor_reason", "gauge", "1 for why it is not NOMINAL.", _governor_reasons),
    Row(
        "edgellm_governor_pace_ratio",
        "gauge",
        "Share of the time in which the engine may compute.",
        _field("governor.pace"),
    ),
    Row(
        "edgellm_governor_max_sequences",
        "gauge",
        "Requests that may run at once.",
        _field("governor.max_sequences"),
    ),
    Row(
        "edgellm_governor_refusing",
        "gauge",
        "1 while new requests are refused for heat.",
        _field("governor.refusing"),
    ),
    Row(
        "edgellm_thermal_slope_celsius_per_second",
        "gauge",
        "How fast the zone nearest to throttling gets hotter.",
        _field("governor.slope_celsius_per_s"),
    ),
    Row(
        "edgellm_power_budget_watts",
        "gauge",
        "What the module may take.",
        _field("governor.power_budget_mw", 1e-3),
    ),
    Row("edgellm_uplink_connected", "gauge", "1 with a broker.", _field("uplink.connected")),
    Row("edgellm_uplink_queued_events", "gauge", "Events on disk.", _field("uplink.queued_events")),
    Row("edgellm_uplink_queued_telemetry", "gauge", "Records on disk.", _field("uplink.queued_telemetry")),
    Row("edgellm_uplink_queued_bytes", "gauge", "All of the outbox.", _field("uplink.queued_bytes")),
    Row(
        "edgellm_uplink_dropped_telemetry",
        "counter",
        "Dropped because the outbox was full.",
        _field("uplink.dropped_telemetry_total"),
    ),
    Row(
        "edgellm_uplink_connections",
        "counter",
        "Connections to the broker.",
        _field("uplink.connections_total"),
    ),
)


def render(record: Telemetry | None, accept: str = "", totals: Totals | None = None) -> tuple[bytes, str]:
    """The metrics and their media type: OpenMetrics or Prometheus text, whichever `accept` prefers.

    Percentiles of many devices cannot be added up; histograms can, so `totals` brings them beside the record.
    """
    encode, media_type = choose_encoder(accept)
    return encode(_Once(record or telemetry_pb2.Telemetry(), totals)), media_type


class _Once:
    """One record as a registry, which is what encoders take."""

    def __init__(self, record: Telemetry, totals: Totals | None) -> None:
        self._record = record
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        for row in TABLE:
            # Not a family's class for each kind: that of summaries insists on a sum and a count.
            family = Metric(row.name, row.help, row.kind)
            suffix = "_total" if row.kind == "counter" else ""
            for labels, value in row.read(self._record):
                family.add_sample(row.name + suffix, dict(labels), value)
            if family.samples:
                yield family
        if self._totals is not None:
            yield _histogram(
                "edgellm_time_to_first_token_seconds",
                "From the request to the first token.",
                self._totals.first_token,
            )
            yield _histogram(
                "edgellm_inter_token_latency_seconds",
                "From one token of an answer to the next.",
                self._totals.inter_token,
            )


def _histogram(name: str, text: str, figures: Histogram) -> Metric:
    buckets = [(str(bound_s), float(count)) for bound_s, count in figures.cumulative()]
    buckets.append(("+Inf", float(figures.count)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=figures.sum_s)
