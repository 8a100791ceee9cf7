"""Only what is what its topic says is taken; everything else is refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.fleet.topics import DeviceTopics, Encoding, encode, envelope, state_event, telemetry_events
from edgellm.fleet.validate import MAX_PAYLOAD_BYTES, RejectedError, check
from edgellm.v1 import fleet_pb2
from tests.support.fleet_devices import ENGINE, orin_nano_record

TOPICS = DeviceTopics("default", "line-1", "jetson-01")
NOW_NS = 1_800_000_000 * 10**9


def taken(topic: str, event: fleet_pb2.Event, encoding: Encoding = "json"):
    return check(topic, encode(event, encoding), received_ns=NOW_NS, retained=False)


def reason(topic: str, payload: bytes) -> str:
    with pytest.raises(RejectedError) as refused:
        check(topic, payload, received_ns=NOW_NS, retained=False)
    return refused.value.reason


def worker_event(**changes: object) -> fleet_pb2.Event:
    event = envelope(TOPICS, "worker", 3, 7, NOW_NS)
    event.worker.engine = ENGINE
    for name, value in changes.items():
        setattr(event, name, value)
    return event


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
def test_all_that_a_device_says_is_taken(encoding: Encoding):
    for name, event in telemetry_events(TOPICS, 1, orin_nano_record(5, NOW_NS)):
        assert taken(TOPICS.telemetry(name), event, encoding).part == name
    assert taken(TOPICS.event("worker"), worker_event(), encoding).event == worker_event()
    will = state_event(TOPICS, fleet_pb2.DeviceState(session=2), run=1, revision=0, time_ns=None)
    assert taken(TOPICS.state, will, encoding).time_ns is None


def test_a_wish_of_the_fleet_has_the_fleet_s_source():
    wish = fleet_pb2.Event(id="d-1", source="edgellm/default/fleet", type="edgellm.desired.v1")
    wish.desired.generation = 1
    assert taken(TOPICS.desired, wish).part == "desired"
    wish.source = TOPICS.source
    assert reason(TOPICS.desired, encode(wish, "json")) == "wrong source"


def test_a_device_cannot_speak_for_another():
    other = DeviceTopics("default", "line-1", "jetson-02")
    assert reason(other.event("worker"), encode(worker_event(), "json")) == "wrong source"


@pytest.mark.parametrize(
    ("topic", "changes", "expected"),
    [
        (TOPICS.event("engine"), {}, "wrong type"),
        (TOPICS.event("worker"), {"type": "edgellm.engine.v1"}, "wrong type"),
        (TOPICS.event("worker"), {"id": ""}, "no id"),
        (TOPICS.event("worker"), {"id": "x" * 129}, "no id"),
        (TOPICS.event("worker"), {"run": 2**63}, "impossible number"),
        (TOPICS.base + "/evt/other", {}, "unknown topic"),
        ("edgellm/v1/default/line-1", {}, "unknown topic"),
        ("edgellm/v1/default/line 1/jetson-01/evt/worker", {}, "unknown topic"),
    ],
)
def test_what_does_not_fit_its_topic_is_refused(topic: str, changes: dict[str, object], expected: str):
    assert reason(topic, encode(worker_event(**changes), "json")) == expected


def test_a_time_that_cannot_be_is_refused_and_a_wrong_one_is_not():
    wrong = worker_event()
    wrong.time.seconds = 0
    assert taken(TOPICS.event("worker"), wrong).time_ns == 0
    for seconds, nanos in ((-1, 0), (2**62, 0), (0, 10**9)):
        wrong.time.seconds, wrong.time.nanos = seconds, nanos
        assert reason(TOPICS.event("worker"), wrong.SerializeToString()) == "impossible time"


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused(figure: float):
    record = orin_nano_record(5, NOW_NS)
    record.thermal.zones[2].celsius = figure
    name, event = next(telemetry_events(TOPICS, 1, record))
    assert reason(TOPICS.telemetry(name), encode(event, "protobuf")) == "impossible number"


def test_what_is_too_large_is_not_even_parsed():
    assert reason(TOPICS.event("worker"), b"{" * (MAX_PAYLOAD_BYTES + 1)) == "too large"


def test_only_a_retained_message_can_be_cleared():
    cleared = check(TOPICS.desired, b"", received_ns=NOW_NS, retained=False)
    assert (cleared.part, cleared.event) == ("desired", None)
    assert reason(TOPICS.event("worker"), b"") == "empty"


LEAVES = [
    "state",
    "desired",
    "reported",
    "tele/thermal",
    "tele/runtime",
    "evt/worker",
    "evt/throttle",
    "cmd/req",
]


@given(
    st.sampled_from(LEAVES), st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode())
)
def test_no_bytes_whatsoever_raise_anything_else(leaf: str, payload: bytes):
    try:
        check(f"{TOPICS.base}/{leaf}", payload, received_ns=NOW_NS, retained=False)
    except RejectedError:
        return


@given(st.data())
def test_no_damage_to_a_good_message_raises_anything_else(data: st.DataObject):
    encoding: Encoding = data.draw(st.sampled_from(["json", "protobuf"]))
    good = bytearray(encode(worker_event(), encoding))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        check(TOPICS.event("worker"), bytes(good), received_ns=NOW_NS, retained=False)
    except RejectedError:
        return
