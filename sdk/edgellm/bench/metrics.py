"""Figures from recorded arrival times: pure functions, with the names of AIPerf and trtllm-bench.

Percentiles are nearest-rank: the p-th of n sorted values is number ceil(p/100 * n), so each is a value that
was measured. For one request with n output tokens:

- time to first token (TTFT): from when it was due to its first token;
- time per output token (TPOT): (last token - first token) / (n - 1), which AIPerf calls inter-token latency;
- inter-token latency (ITL), here: each gap by itself, so that a stall shows. Tokens that arrive together
  are 0 apart, so the gaps of a request have the TPOT as their mean;
- output token throughput per user: 1 / TPOT.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from edgellm.bench.load import Record

# A stretch without a power reading that is longer than this makes the energy unknown, seconds.
_LONGEST_GAP_S = 5.0


@dataclass(frozen=True)
class Distribution:
    """Nearest-rank percentiles of `count` values, in the unit of the values."""

    count: int
    minimum: float
    p50: float
    p90: float
    p95: float
    p99: float
    maximum: float
    average: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None if there are no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            count=len(ordered),
            minimum=ordered[0],
            p50=nearest_rank(ordered, 50),
            p90=nearest_rank(ordered, 90),
            p95=nearest_rank(ordered, 95),
            p99=nearest_rank(ordered, 99),
            maximum=ordered[-1],
            average=statistics.fmean(ordered),
        )


@dataclass(frozen=True)
class Metrics:
    """What a run came to.

    Throughputs count finished requests over `span_s`, from when the first was due to the end of the last. The
    `server_` figures are the target's own clock. None is what could not be measured.
    """

    requests: int
    errors: dict[str, int]
    unfinished: int
    span_s: float
    avg_input_tokens: float | None
    avg_output_tokens: float | None
    request_throughput_req_s: float
    system_output_throughput_tok_s: float
    time_to_first_token_ms: Distribution | None
    time_per_output_token_ms: Distribution | None
    inter_token_latency_ms: Distribution | None
    request_latency_ms: Distribution | None
    output_token_throughput_per_user_tok_s: Distribution | None
    server_time_to_first_token_ms: Distribution | None
    server_queue_ms: Distribution | None
    energy_j: float | None = None
    output_tokens_per_joule: float | None = None

    def to_dict(self) -> dict[str, object]:
        """All figures, and the averages under the names that trtllm-bench gives them."""
        averages = {
            "avg_ttft_ms": self.time_to_first_token_ms,
            "avg_tpot_ms": self.time_per_output_token_ms,
            "avg_request_latency_ms": self.request_latency_ms,
        }
        return asdict(self) | {name: shown and shown.average for name, shown in averages.items()}


class PowerSample(NamedTuple):
    """What a device drew at a moment of the client's clock."""

    at_s: float
    power_mw: float


def nearest_rank(ordered: Sequence[float], percent: float) -> float:
    """The value below or at which `percent` (above 0, up to 100) of the sorted values lie."""
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


def summarize(
    records: Sequence[Record], *, unfinished: int = 0, power: Sequence[PowerSample] = ()
) -> Metrics:
    """The figures of a run; failed requests are counted by code and count for nothing else."""
    good = [record for record in records if record.error is None]
    span_s, output_tokens = _span_s(records), sum(record.output_tokens for record in good)
    used_j = (
        energy_j(power, min(r.began_s for r in records), max(r.ended_s for r in records)) if records else None
    )
    tpots_s = [tpot for record in good if (tpot := tpot_s(record)) is not None]
    return Metrics(
        requests=len(good),
        errors=dict(Counter(record.error.code for record in records if record.error is not None)),
        unfinished=unfinished,
        span_s=span_s,
        avg_input_tokens=_mean(record.usage.prompt_tokens for record in good),
        avg_output_tokens=_mean(record.output_tokens for record in good),
        request_throughput_req_s=len(good) / span_s if span_s else 0.0,
        system_output_throughput_tok_s=output_tokens / span_s if span_s else 0.0,
        time_to_first_token_ms=_ms(ttft_s(record) for record in good),
        time_per_output_token_ms=_ms(tpots_s),
        inter_token_latency_ms=_ms(gap for record in good for gap in gaps_s(record)),
        request_latency_ms=_ms(record.ended_s - record.began_s for record in good),
        output_token_throughput_per_user_tok_s=Distribution.of(1 / tpot for tpot in tpots_s if tpot > 0),
        server_time_to_first_token_ms=_ms(record.usage.ttft_s for record in good),
        server_queue_ms=_ms(record.usage.queue_s for record in good),
        energy_j=used_j,
        output_tokens_per_joule=output_tokens / used_j if used_j else None,
    )


def ttft_s(record: Record) -> float | None:
    """Time to first token; None without one."""
    return record.arrivals[0].at_s - record.began_s if record.arrivals else None


def tpot_s(record: Record) -> float | None:
    """Time per output token after the first; None for an answer of one token or none."""
    if not record.arrivals or record.output_tokens < 2:
        return None
    return (record.arrivals[-1].at_s - record.arrivals[0].at_s) / (record.output_tokens - 1)


def gaps_s(record: Record) -> list[float]:
    """Time between each two successive tokens: one value fewer than tokens arrived."""
    times = [arrival.at_s for arrival in record.arrivals for _ in range(arrival.tokens)]
    return [after - before for before, after in itertools.pairwise(times)]


def energy_j(power: Sequence[PowerSample], start_s: float, end_s: float) -> float | None:
    """Joules between two moments; each reading holds until the next one.

    None if a part of the time has no reading near it: a guess would look like a measurement.
    """
    known = [sample for sample in power if sample.at_s <= end_s]
    before = [sample for sample in known if sample.at_s <= start_s][-1:]
    inside = [sample for sample in known if sample.at_s > start_s]
    readings = before + inside
    edges = [*(sample.at_s for sample in readings), end_s]
    gaps = [after - at for at, after in itertools.pairwise(edges)]
    if not readings or readings[0].at_s - start_s > _LONGEST_GAP_S or max(gaps) > _LONGEST_GAP_S:
        return None
    # What was drawn before the first reading is taken to be the same.
    edges[0] = start_s
    spans = [after - at for at, after in itertools.pairwise(edges)]
    return sum(reading.power_mw / 1e3 * span for reading, span in zip(readings, spans, strict=True))


def _span_s(records: Sequence[Record]) -> float:
    if not records:
        return 0.0
    return max(record.ended_s for record in records) - min(record.began_s for record in records)


def _mean(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _ms(values_s: Iterable[float | None]) -> Distribution | None:
    return Distribution.of(value * 1e3 for value in values_s if value is not None)
