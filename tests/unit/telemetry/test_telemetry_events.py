"""What travels over MQTT: names, payloads, the session's number, settings."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.fleet.topics import (
    EVENTS,
    TELEMETRY,
    DeviceTopics,
    decode,
    encode,
    state_event,
    telemetry_events,
)
from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.mqtt.session import SessionCounter
from edgellm_agent.mqtt.settings import MqttSettings

TOPICS = DeviceTopics("acme", "line-1", "jetson-01")


def full_record() -> telemetry_pb2.Telemetry:
    record = telemetry_pb2.Telemetry(
        sequence=17,
        monotonic_ns=5_000_000_001,
        thermal=telemetry_pb2.Thermal(max_celsius=49.25),
        power=telemetry_pb2.Power(total_mw=0.0, mode="15W"),
        compute=telemetry_pb2.Compute(gpu_percent=0.0),
        memory=telemetry_pb2.Memory(total_bytes=2**33, available_bytes=2**32),
        runtime=telemetry_pb2.Runtime(state="serving", kv_bound_bytes=2**30),
    )
    record.time.FromNanoseconds(1_700_000_000_123_000_000)
    return record


def test_each_topic_carries_its_parts_with_the_attributes_of_an_event() -> None:
    events = dict(telemetry_events(TOPICS, 4, full_record()))
    assert list(events) == ["thermal", "power", "runtime"]
    thermal, power, runtime = events.values()
    assert [event.id for event in events.values()] == [
        "4-telemetry.thermal-17",
        "4-telemetry.power-17",
        "4-telemetry.runtime-17",
    ]
    assert (power.run, power.sequence, runtime.run, runtime.sequence) == (4, 17, 4, 17)
    assert thermal.type == "edgellm.telemetry.thermal.v1"
    assert thermal.source == "edgellm/acme/line-1/jetson-01"
    assert thermal.time == full_record().time
    parts = {
        event.type: [field.name for field, _ in event.telemetry.ListFields()][3:] for event in events.values()
    }
    assert parts == {
        "edgellm.telemetry.thermal.v1": ["thermal"],
        "edgellm.telemetry.power.v1": ["power"],
        "edgellm.telemetry.runtime.v1": ["compute", "memory", "runtime"],
    }


def test_a_topic_without_a_part_is_not_sent() -> None:
    record = full_record()
    record.ClearField("power")
    assert [name for name, _ in telemetry_events(TOPICS, 1, record)] == ["thermal", "runtime"]
    assert [name for name, _ in telemetry_events(TOPICS, 1, record, ["power", "runtime"])] == ["runtime"]


def test_topics_of_a_device_are_told_by_name_and_read_back() -> None:
    prefix = "edgellm/v1/acme/line-1/jetson-01"
    assert [TOPICS.telemetry(name) for name in TELEMETRY] == [
        f"{prefix}/tele/{name}" for name in ("thermal", "power", "runtime")
    ]
    assert [TOPICS.event(kind) for kind in EVENTS] == [
        f"{prefix}/evt/{leaf}" for leaf in ("throttle", "deploy", "worker")
    ]
    assert DeviceTopics.parse(TOPICS.event("engine")) == (TOPICS, "evt/deploy")
    assert DeviceTopics.parse(TOPICS.state) == (TOPICS, "state")


@pytest.mark.parametrize("topic", ["", "edgellm/v1/a/b/c", "other/v1/a/b/c/state", "edgellm/v1/a//c/state"])
def test_a_topic_of_no_device_is_a_value_error(topic: str) -> None:
    with pytest.raises(ValueError, match=r"no topic of a device|cannot be part of a topic"):
        DeviceTopics.parse(topic)


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
def test_an_event_comes_back_equal_and_its_bytes_are_stable(encoding: str) -> None:
    for _, event in telemetry_events(TOPICS, 4, full_record()):
        payload = encode(event, encoding)  # type: ignore[arg-type]
        assert decode(payload) == event
        assert encode(decode(payload), encoding) == payload  # type: ignore[arg-type]


def test_json_shows_known_zeros_and_hides_what_is_unknown() -> None:
    events = {
        name: json.loads(encode(event, "json")) for name, event in telemetry_events(TOPICS, 1, full_record())
    }
    assert events["power"]["telemetry"]["power"]["total_mw"] == 0
    assert events["runtime"]["telemetry"]["compute"] == {"gpu_percent": 0.0}
    assert events["runtime"]["telemetry"]["runtime"]["running_sequences"] == 0
    assert "worker_rss_bytes" not in events["runtime"]["telemetry"]["runtime"]
    away = state_event(TOPICS, fleet_pb2.DeviceState(session=3), run=3, revision=0, time_ns=None)
    assert json.loads(encode(away, "json"))["state"]["online"] is False
    assert "time" not in json.loads(encode(away, "json"))


@given(st.binary(max_size=200))
def test_a_payload_that_is_no_event_is_a_value_error_or_an_event(payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(decode(payload), fleet_pb2.Event)


@pytest.mark.parametrize("payload", [b"{", b'{"telemetry": 1}', b'{"id": "\xff"}', b"\x0a\xff", b"{" * 5000])
def test_a_broken_payload_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"edgellm\.v1\.Event"):
        decode(payload)


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "$SYS", "a\0", "a b", "a\n", "x" * 65])
def test_a_name_that_would_change_the_topic_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be part of a topic"):
        DeviceTopics("default", "default", name)
    with pytest.raises(pydantic.ValidationError):
        MqttSettings(host="localhost", tenant=name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""},
        {"host": "a..b"},
        {"port": 0},
        {"qos": 2},
        {"protocol": "3.1"},
        {"interval_s": 0.0},
        {"user": "x"},
        {"max_silence_s": -1.0},
        {"outbox_bytes": 1000},
        {"offline_interval_s": 0.0},
        {"catch_up_messages_per_s": 0.0},
        {"tls": {"key_file": "/key"}},
    ],
)
def test_settings_that_could_never_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        MqttSettings.model_validate({"host": "localhost"} | wrong)


def test_the_session_number_grows_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "state" / "mqtt-session"
    first = SessionCounter(path)
    assert [first.last, first.take(), first.take(), first.last] == [0, 1, 2, 2]
    assert SessionCounter(path).take() == 3
    assert [file.name for file in path.parent.iterdir()] == ["mqtt-session"]


def test_a_damaged_session_file_does_not_turn_the_number_back(tmp_path: Path) -> None:
    path = tmp_path / "mqtt-session"
    path.write_bytes(b"\x00\x00")
    assert SessionCounter(path, wall_s=lambda: 1_700_000_000.5).take() == 1_700_000_001
    assert SessionCounter(path).take() == 1_700_000_002


def test_a_device_that_was_set_up_anew_does_not_use_the_run_numbers_of_its_former_life(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mqtt-run"
    assert SessionCounter(path, wall_s=lambda: 1_700_000_000.5, lone=True).take() == 1_700_000_001
    assert SessionCounter(path, wall_s=lambda: 0, lone=True).take() == 1_700_000_002


def test_a_disk_that_cannot_be_written_does_not_stop_the_count(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    counter = SessionCounter(tmp_path / "file" / "mqtt-session", wall_s=lambda: 100.0)
    assert counter.take() + 1 == counter.take()


def test_telemetry_keeps_the_agent_light() -> None:
    heavy = ("numpy", "tokenizers", "onnxruntime", "torch", "jinja2")
    program = (
        "import sys, edgellm_agent.mqtt.publisher, edgellm_agent.telemetry.detect;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"


def test_topics_know_no_mqtt_client() -> None:
    program = "import sys, edgellm.fleet.topics; print('paho' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "False\n"
