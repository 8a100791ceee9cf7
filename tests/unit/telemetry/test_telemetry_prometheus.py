"""The record as Prometheus reads it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.prometheus import TABLE, render
from tests.support.telemetry_records import busy_totals, full_record

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def samples(record, parse=parse_text, accept="", totals=None):
    body, _ = render(record, accept, totals)
    families = list(parse(body.decode()))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def figures(message):
    """All numbers in a message."""
    for field, value in message.ListFields():
        for item in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
            if field.message_type:
                yield from figures(item)
            elif not isinstance(item, str):
                yield field.name, item


def test_every_figure_of_a_record_is_there_in_base_units():
    record = full_record()
    record.ClearField("time")
    record.governor.ClearField("reasons")
    values = list(samples(record).values())
    scales = {"mw": 1e-3, "mv": 1e-3, "ma": 1e-3, "mhz": 1e6, "percent": 1e-2}
    for name, figure in figures(record):
        if name in ("sequence", "monotonic_ns"):
            continue
        expected = figure * scales.get(name.rpartition("_")[2], 1)
        assert any(value == pytest.approx(expected) for value in values), name


def test_each_row_has_a_sample_from_a_full_record_and_a_name_of_its_own():
    record = full_record()
    assert all(list(row.read(record)) for row in TABLE)
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_what_is_absent_has_no_sample_and_zero_has_one():
    record = telemetry_pb2.Telemetry(runtime=telemetry_pb2.Runtime(state="none"))
    found = samples(record)
    assert found["edgellm_running_sequences",] == 0
    assert found["edgellm_requests_total",] == 0
    assert ("edgellm_worker_rss_bytes",) not in found
    assert ("edgellm_power_watts",) not in found
    assert ("edgellm_memory_total_bytes",) not in found


def test_before_the_first_record_there_is_nothing():
    assert samples(None) == {}


def test_the_state_is_one_of_those_listed():
    found = samples(full_record())
    states = {labels[0]: value for (name, *labels), value in found.items() if name == "edgellm_engine_state"}
    assert [state for state, value in states.items() if value] == ["serving"]


def test_the_governor_is_in_one_state_for_some_of_the_reasons():
    found = samples(full_record())
    labels = {
        (name, *labels)
        for (name, *labels), value in found.items()
        if value == 1 and name in ("edgellm_governor_state", "edgellm_governor_reason")
    }
    assert labels == {
        ("edgellm_governor_state", "HOT"),
        ("edgellm_governor_reason", "temperature"),
        ("edgellm_governor_reason", "over_current"),
    }
    assert found["edgellm_governor_state", "NOMINAL"] == 0


def test_percentiles_have_their_quantile_as_a_label():
    figures = telemetry_pb2.Percentiles(p50_s=0.1, p95_s=0.2, p99_s=0.3, count=7)
    runtime = telemetry_pb2.Runtime(time_to_first_token=figures)
    found = samples(telemetry_pb2.Telemetry(runtime=runtime))
    quantiles = {q: found["edgellm_recent_time_to_first_token_seconds", q] for q in ("0.5", "0.95", "0.99")}
    assert quantiles == {"0.5": 0.1, "0.95": 0.2, "0.99": 0.3}
    assert found["edgellm_recent_first_tokens",] == 7
    assert ("edgellm_recent_inter_token_gaps",) not in found


def test_histograms_are_cumulative_with_sum_and_count():
    found = samples(None, totals=busy_totals())
    assert found["edgellm_time_to_first_token_seconds_bucket", "0.25"] == 0
    assert found["edgellm_time_to_first_token_seconds_bucket", "0.5"] == 1
    assert found["edgellm_time_to_first_token_seconds_bucket", "+Inf"] == 1
    assert found["edgellm_inter_token_latency_seconds_count",] == 9
    assert found["edgellm_inter_token_latency_seconds_sum",] == pytest.approx(0.18)


def test_names_of_sensors_are_escaped():
    zone = telemetry_pb2.ThermalZone(name='a"b\\c\nd', celsius=40)
    record = telemetry_pb2.Telemetry(thermal=telemetry_pb2.Thermal(zones=[zone]))
    assert samples(record)["edgellm_temperature_celsius", 'a"b\\c\nd'] == 40


def test_a_scraper_that_asks_for_openmetrics_gets_the_same_in_it():
    record, totals = full_record(), busy_totals()
    body, media_type = render(record, OPENMETRICS, totals)
    assert media_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert samples(record, parse_openmetrics, OPENMETRICS, totals) == samples(record, totals=totals)
    assert render(record)[1].startswith("text/plain")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, which comes with Prometheus")
def test_prometheus_own_linter_has_nothing_to_say():
    body, _ = render(full_record(), totals=busy_totals())
    done = subprocess.run(["promtool", "check", "metrics"], check=False, input=body, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_document_lists_what_is_exported():
    text = (Path(__file__).parents[3] / "docs/prometheus.md").read_text()
    table = text.partition("## Metrics\n")[2].partition("\n## ")[0]
    body, _ = render(full_record(), totals=busy_totals())
    counters = {row.name for row in TABLE if row.kind == "counter"}
    names = {family.name for family in parse_text(body.decode())}
    assert set(re.findall(r"`(edgellm_\w+)`", table)) == {
        f"{name}_total" if name in counters else name for name in names
    }
