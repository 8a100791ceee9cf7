"""Telemetry as an Orin Nano might send it; the figures are made up."""

from __future__ import annotations

import math

from edgellm.v1 import telemetry_pb2

DIGEST = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def record(
    sequence: int = 1, *, celsius: float = 71.5, state: str = "WARM", tokens_per_s: float = 42.5
) -> telemetry_pb2.Telemetry:
    """A record with all its parts, taken on 2026-03-01 at noon and `sequence` seconds."""
    zones = [
        telemetry_pb2.ThermalZone(name="cpu-thermal", celsius=celsius - 1.5),
        telemetry_pb2.ThermalZone(
            name="tj-thermal", celsius=celsius, passive_celsius=99.0, critical_celsius=104.5
        ),
    ]
    message = telemetry_pb2.Telemetry(
        sequence=sequence,
        monotonic_ns=sequence * 10**9,
        thermal=telemetry_pb2.Thermal(zones=zones, max_celsius=celsius, margin_celsius=99.0 - celsius),
        power=power(),
        compute=telemetry_pb2.Compute(
            cpu_percent=23.4, cpu_mhz=1510.4, gpu_percent=96.0, gpu_mhz=918.0, gpu_max_mhz=1020.0
        ),
        memory=telemetry_pb2.Memory(
            total_bytes=7_990_000_000,
            available_bytes=2_410_000_000,
            swap_total_bytes=3_990_000_000,
            swap_used_bytes=0,
            pressure_some_percent=0.0,
        ),
        runtime=runtime(tokens_per_s),
        governor=governor(state),
        uplink=telemetry_pb2.Uplink(connected=True, queued_telemetry=3, queued_bytes=1234),
    )
    message.time.FromSeconds(1_772_366_400 + sequence)
    return message


def power() -> telemetry_pb2.Power:
    rails = [
        telemetry_pb2.PowerRail(name="VDD_IN", voltage_mv=5040, current_ma=2440, power_mw=12_300),
        telemetry_pb2.PowerRail(name="VDD_CPU_GPU_CV", power_mw=6_100),
    ]
    events = [telemetry_pb2.OverCurrent(kind="average", events=2)]
    return telemetry_pb2.Power(
        total_mw=12_300, rails=rails, mode="15W", over_current=events, energy_total_j=36_000
    )


def runtime(tokens_per_s: float) -> telemetry_pb2.Runtime:
    return telemetry_pb2.Runtime(
        state="serving",
        engine=DIGEST,
        prefill_tokens_per_s=310.0,
        decode_tokens_per_s=tokens_per_s,
        running_sequences=2,
        waiting_requests=1,
        kv_used_bytes=310_000_000,
        kv_bound_bytes=1_200_000_000,
        finished_requests_total=120,
        worker_rss_bytes=1_150_000_000,
        load_s=1.25,
        time_to_first_token=telemetry_pb2.Percentiles(p50_s=0.21, p95_s=0.4, p99_s=1.3, count=31),
        inter_token_latency=telemetry_pb2.Percentiles(p50_s=0.047, p95_s=0.058, p99_s=0.09, count=900),
        tokens_per_joule=3.46,
        joules_per_request=38.2,
    )


def governor(state: str) -> telemetry_pb2.Governor:
    return telemetry_pb2.Governor(
        state=state,
        reasons=[] if state == "NOMINAL" else ["temperature"],
        pace=0.8,
        max_sequences=4,
        slope_celsius_per_s=0.05,
        power_budget_mw=15_000,
    )


def minute(target_celsius: float, state: str) -> list[telemetry_pb2.Telemetry]:
    """A minute in which a board warms up to a temperature, one record a second."""
    return [
        record(
            second + 1,
            celsius=target_celsius - 18 * math.exp(-second / 25) + math.sin(second),
            state=state,
            tokens_per_s=42 + 6 * math.sin(second / 3),
        )
        for second in range(60)
    ]
