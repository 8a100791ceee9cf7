"""The record as Prometheus reads it."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.prometheus import TABLE, render

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def full_record():
    """A record whose every field has a figure of its own; those of messages in lists too."""
    counter = iter(range(1, 1000))

    def fill(message):
        for field in message.DESCRIPTOR.fields:
            repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
            if field.message_type:
                inner = getattr(message, field.name)
                fill(inner.add() if repeated else inner)
            elif field.type == field.TYPE_STRING:
                setattr(message, field.name, f"{field.name}-{next(counter)}")
            else:
                setattr(message, field.name, next(counter))

    record = telemetry_pb2.Telemetry()
    fill(record)
    record.runtime.state = "serving"
    return record


def samples(record, parse=parse_text, accept=""):
    body, _ = render(record, accept)
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


def test_names_of_sensors_are_escaped():
    zone = telemetry_pb2.ThermalZone(name='a"b\\c\nd', celsius=40)
    record = telemetry_pb2.Telemetry(thermal=telemetry_pb2.Thermal(zones=[zone]))
    assert samples(record)["edgellm_temperature_celsius", 'a"b\\c\nd'] == 40


def test_a_scraper_that_asks_for_openmetrics_gets_it():
    body, media_type = render(full_record(), OPENMETRICS)
    assert media_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert samples(full_record(), parse_openmetrics, OPENMETRICS).keys() == samples(full_record()).keys()
    assert render(full_record())[1].startswith("text/plain")
