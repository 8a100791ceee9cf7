"""Which telemetry is worth a message."""

from __future__ import annotations

import math

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.fleet.topics import TELEMETRY
from edgellm.v1 import telemetry_pb2
from edgellm_agent.mqtt.deadband import DEFAULTS, Deadband
from edgellm_agent.mqtt.settings import MqttSettings


def record(at_s: float = 0.0, **changes: object) -> telemetry_pb2.Telemetry:
    """A busy board; `changes` are texts of parts, by part."""
    full = telemetry_pb2.Telemetry(
        monotonic_ns=round(at_s * 1e9),
        thermal=telemetry_pb2.Thermal(
            zones=[telemetry_pb2.ThermalZone(name="tj-thermal", celsius=50.0)], max_celsius=50.0
        ),
        power=telemetry_pb2.Power(
            total_mw=5000.0,
            rails=[telemetry_pb2.PowerRail(name="VDD_IN", power_mw=5000.0)],
            mode="15W",
            over_current=[telemetry_pb2.OverCurrent(kind="average", events=0)],
        ),
        runtime=telemetry_pb2.Runtime(state="serving", decode_tokens_per_s=20.0, generated_tokens_total=100),
        governor=telemetry_pb2.Governor(state="NOMINAL", pace=1.0, max_sequences=8),
    )
    full.MergeFrom(telemetry_pb2.Telemetry(**changes))  # type: ignore[arg-type]
    return full


def told(before: telemetry_pb2.Telemetry, now: telemetry_pb2.Telemetry, **overrides: float) -> list[str]:
    deadband = Deadband(
        {name.replace("__", "."): value for name, value in overrides.items()}, max_silence_s=3600
    )
    assert deadband.take(before) == list(TELEMETRY)
    return deadband.take(now)


def test_the_first_record_goes_out_whole_and_the_same_again_does_not() -> None:
    assert told(record(), record(1.0)) == []


def test_a_metric_that_moves_within_its_deadband_is_not_told_and_beyond_it_is() -> None:
    within = record(thermal=telemetry_pb2.Thermal(max_celsius=51.0))
    beyond = record(thermal=telemetry_pb2.Thermal(max_celsius=51.01))
    assert told(record(), within) == []
    assert told(record(), beyond) == ["thermal"]


def test_a_slow_drift_is_told_since_it_is_measured_from_what_was_said() -> None:
    deadband = Deadband({}, max_silence_s=3600)
    drift = [record(thermal=telemetry_pb2.Thermal(max_celsius=50.0 + step * 0.3)) for step in range(20)]
    assert [step for step, each in enumerate(drift) if "thermal" in deadband.take(each)] == [0, 4, 8, 12, 16]


def test_silence_ends_after_its_limit_by_the_monotonic_clock() -> None:
    deadband = Deadband({}, max_silence_s=60)
    deadband.take(record(0))
    assert deadband.take(record(59.9)) == []
    assert deadband.take(record(60)) == ["thermal", "power", "runtime"]
    assert deadband.take(record(61)) == []


def test_without_silence_everything_is_told() -> None:
    deadband = Deadband({}, max_silence_s=0)
    for _ in range(3):
        assert deadband.take(record()) == list(TELEMETRY)


def test_a_new_connection_begins_with_everything() -> None:
    deadband = Deadband({}, max_silence_s=3600)
    deadband.take(record())
    deadband.reset()
    assert deadband.take(record()) == list(TELEMETRY)


@pytest.mark.parametrize(
    ("topic", "changes"),
    [
        ("runtime", {"runtime": telemetry_pb2.Runtime(state="restarting")}),
        ("runtime", {"runtime": telemetry_pb2.Runtime(engine="sha256:1")}),
        ("runtime", {"runtime": telemetry_pb2.Runtime(worker_restarts_total=1)}),
        ("runtime", {"governor": telemetry_pb2.Governor(state="HOT")}),
        ("runtime", {"governor": telemetry_pb2.Governor(reasons=["power"])}),
        ("runtime", {"governor": telemetry_pb2.Governor(refusing=True)}),
        ("runtime", {"governor": telemetry_pb2.Governor(max_sequences=7)}),
        ("runtime", {"uplink": telemetry_pb2.Uplink(connected=True)}),
        ("power", {"power": telemetry_pb2.Power(mode="25W")}),
        (
            "power",
            {"power": telemetry_pb2.Power(over_current=[telemetry_pb2.OverCurrent(kind="x", events=1)])},
        ),
        ("thermal", {"thermal": telemetry_pb2.Thermal(margin_celsius=40.0)}),
        ("power", {"power": telemetry_pb2.Power(rails=[telemetry_pb2.PowerRail(name="new", power_mw=0.0)])}),
    ],
)
def test_a_state_a_count_of_faults_and_what_comes_or_goes_are_always_told(
    topic: str, changes: dict[str, object]
) -> None:
    assert told(record(), record(**changes)) == [topic]
    assert told(record(**changes), record()) == [topic]


def test_counters_that_only_grow_travel_with_others_and_cause_nothing() -> None:
    more = record(
        runtime=telemetry_pb2.Runtime(generated_tokens_total=10_000, requests_total=20),
        power=telemetry_pb2.Power(energy_total_j=4000.0),
    )
    assert told(record(), more) == []


def test_a_zone_that_gets_hot_is_told_whatever_its_place_in_the_list() -> None:
    def zones(*pairs: tuple[str, float]) -> telemetry_pb2.Telemetry:
        listed = [telemetry_pb2.ThermalZone(name=name, celsius=celsius) for name, celsius in pairs]
        return telemetry_pb2.Telemetry(thermal=telemetry_pb2.Thermal(zones=listed))

    deadband = Deadband({}, max_silence_s=3600)
    deadband.take(zones(("cpu[0].x", 40.0), ("gpu", 60.0)))
    assert deadband.take(zones(("gpu", 60.0), ("cpu[0].x", 40.0))) == []
    assert deadband.take(zones(("gpu", 60.0), ("cpu[0].x", 43.0))) == ["thermal"]


def test_an_override_counts_instead_of_the_default_and_infinity_switches_off() -> None:
    now = record(
        thermal=telemetry_pb2.Thermal(max_celsius=50.2), power=telemetry_pb2.Power(total_mw=90_000.0)
    )
    assert told(record(), now) == ["power"]
    assert told(record(), now, thermal__max_celsius=0.1, power__total_mw=math.inf) == ["thermal"]


@given(st.lists(st.floats(-40, 120), min_size=2, max_size=30))
def test_a_reader_is_never_wrong_by_more_than_the_deadband(heat: list[float]) -> None:
    deadband, known = Deadband({}, max_silence_s=3600), math.nan
    for celsius in heat:
        if deadband.take(telemetry_pb2.Telemetry(thermal=telemetry_pb2.Thermal(max_celsius=celsius))):
            known = celsius
        assert abs(known - celsius) <= DEFAULTS["thermal.max_celsius"]


def test_every_metric_of_the_table_is_a_number_of_the_record() -> None:
    for metric in DEFAULTS:
        message = telemetry_pb2.Telemetry.DESCRIPTOR
        *path, leaf = metric.split(".")
        for name in path:
            message = message.fields_by_name[name].message_type
        kind = message.fields_by_name[leaf]
        assert kind.cpp_type not in {kind.CPPTYPE_STRING, kind.CPPTYPE_BOOL, kind.CPPTYPE_MESSAGE}, metric
    assert {metric.split(".")[0] for metric in DEFAULTS} == {
        part for parts in TELEMETRY.values() for part in parts
    }


def test_settings_take_metrics_as_toml_writes_them() -> None:
    nested = MqttSettings(host="h", deadband={"thermal": {"max_celsius": 0.5}, "power.total_mw": 100.0})  # type: ignore[dict-item]
    assert nested.deadband == {"thermal.max_celsius": 0.5, "power.total_mw": 100.0}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            {"thermal": {"max_kelvin": 1.0}},
            r"no metric 'thermal\.max_kelvin'; there are .*thermal\.max_celsius",
        ),
        ({"thermal.max_celsius": -1.0}, "greater than or equal to 0"),
        ({"thermal.max_celsius": "warm"}, "valid number"),
    ],
)
def test_a_metric_that_is_not_there_is_refused_with_those_that_are(wrong: dict[str, float], why: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=why):
        MqttSettings(host="h", deadband=wrong)
