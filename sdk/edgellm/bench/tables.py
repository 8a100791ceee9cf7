"""Results as aligned tables for people and as one JSON document for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from edgellm.bench.device import System
from edgellm.bench.metrics import Distribution, Metrics
from edgellm.bench.session import ChatRow, Findings, InterferenceRow, Measured
from edgellm.bench.sweep import Row

HEADERS = (
    "IN",
    "OUT",
    "LOAD",
    "REQ/S",
    "TOK/S",
    "TTFT P50",
    "TTFT P99",
    "TPOT P50",
    "TPOT P99",
    "ITL P99",
    "LATENCY P50",
    "TOK/J",
    "DONE",
    "ERRORS",
)
CHAT_HEADERS = ("USERS", "TURN", "IN", "OUT", "TTFT P50", "TTFT P99", "TPOT P50", "DONE", "ERRORS")
INTERFERENCE_HEADERS = (
    "STREAMS",
    "IN",
    "ITL P50 CALM",
    "ITL P99 CALM",
    "ITL P50 DURING",
    "ITL P99 DURING",
    "TTFT ALONE",
    "TTFT BESIDE",
    "ROUNDS",
)
NOTE = (
    "Times in milliseconds, as the client saw them; percentiles are nearest-rank, so P99 of fewer than 100 "
    "is the slowest. TTFT: time to first token. TPOT: time per output token after the first. ITL: each gap "
    "between two tokens. TOK/J: output tokens per joule of the whole module."
)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table under `HEADERS`; a dash is what could not be measured."""
    point, metrics = row.point, row.metrics
    ttft, tpot = metrics.time_to_first_token_ms, metrics.time_per_output_token_ms
    return (
        _figure(metrics.avg_input_tokens, 0),
        _figure(metrics.avg_output_tokens, 0),
        f"{point.rate:g}/s" if point.rate else str(point.concurrency),
        f"{metrics.request_throughput_req_s:.2f}",
        f"{metrics.system_output_throughput_tok_s:.1f}",
        _percentile(ttft, "p50", 0),
        _percentile(ttft, "p99", 0),
        _percentile(tpot, "p50", 1),
        _percentile(tpot, "p99", 1),
        _percentile(metrics.inter_token_latency_ms, "p99", 1),
        _percentile(metrics.request_latency_ms, "p50", 0),
        _figure(metrics.output_tokens_per_joule, 2),
        str(metrics.requests),
        errors(metrics),
    )


def errors(metrics: Metrics) -> str:
    """Failures by code, and requests that were stopped."""
    parts = [f"{code} {count}" for code, count in sorted(metrics.errors.items())]
    if metrics.unfinished:
        parts.append(f"stopped {metrics.unfinished}")
    return ", ".join(parts) or "none"


def facts(system: System) -> list[tuple[str, str]]:
    """What was measured, a fact a line."""
    simulated = " (simulated)" if system.simulated else ""
    mode = f", {system.power_mode}" if system.power_mode else ""
    limits = (
        f"{system.max_sequences} sequences, {system.context_tokens} tokens each, "
        f"{system.kv_bytes / 1e6:.0f} MB of KV cache"
    )
    return [
        ("device", f"{system.device}, {system.profile}{simulated}{mode}"),
        ("engine", f"{system.engine} {system.digest}"),
        ("precision", system.precision),
        ("runtime", f"{system.runtime} {system.runtime_version}".strip()),
        ("limits", limits),
        ("agent", system.agent_version),
        ("client", f"{system.client_version} on {system.client_machine}"),
        ("measured", f"{system.measured_at:%Y-%m-%d %H:%M} UTC"),
    ]


def tables(rows: Sequence[Measured]) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
    """Headers and lines of each table that the rows need."""
    sweep = [cells(row) for row in rows if isinstance(row, Row)]
    chats = [line for row in rows if isinstance(row, ChatRow) for line in _chat_lines(row)]
    crowds = [_interference_line(row) for row in rows if isinstance(row, InterferenceRow)]
    found: list[tuple[Sequence[str], list[Sequence[str]]]] = [
        (HEADERS, [*sweep]),
        (CHAT_HEADERS, [*chats]),
        (INTERFERENCE_HEADERS, [*crowds]),
    ]
    return [table for table in found if table[1]]


def document(findings: Findings) -> dict[str, object]:
    """Everything but the single requests; each result carries what it takes to measure it again."""
    system = findings.system
    return {
        "scenario": findings.settings.scenario.value,
        "complete": findings.failure is None and not findings.stopped,
        "results": [
            {
                "command": findings.settings.command(row.point),
                "system": system and asdict(system),
                "settings": asdict(row.point),
                **_figures(row),
            }
            for row in findings.rows
        ],
    }


def _figures(row: Measured) -> dict[str, object]:
    if isinstance(row, Row):
        return {"metrics": row.metrics.to_dict()}
    if isinstance(row, InterferenceRow):
        return {"metrics": asdict(row.result)}
    return {"turns": [{"turn": turn.turn, "metrics": turn.metrics.to_dict()} for turn in row.result.turns]}


def _chat_lines(row: ChatRow) -> list[Sequence[str]]:
    return [
        (
            str(row.point.concurrency),
            str(turn.turn),
            _figure(turn.metrics.avg_input_tokens, 0),
            _figure(turn.metrics.avg_output_tokens, 0),
            _percentile(turn.metrics.time_to_first_token_ms, "p50", 0),
            _percentile(turn.metrics.time_to_first_token_ms, "p99", 0),
            _percentile(turn.metrics.time_per_output_token_ms, "p50", 1),
            str(turn.metrics.requests),
            errors(turn.metrics),
        )
        for turn in row.result.turns
    ]


def _interference_line(row: InterferenceRow) -> Sequence[str]:
    result = row.result
    return (
        str(result.streams),
        _figure(result.avg_input_tokens, 0),
        _percentile(result.calm_inter_token_latency_ms, "p50", 1),
        _percentile(result.calm_inter_token_latency_ms, "p99", 1),
        _percentile(result.during_inter_token_latency_ms, "p50", 1),
        _percentile(result.during_inter_token_latency_ms, "p99", 1),
        _percentile(result.alone_time_to_first_token_ms, "p50", 0),
        _percentile(result.beside_time_to_first_token_ms, "p50", 0),
        str(result.rounds),
    )


def _percentile(distribution: Distribution | None, name: str, digits: int) -> str:
    return _figure(None if distribution is None else getattr(distribution, name), digits)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
