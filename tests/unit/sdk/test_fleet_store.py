"""The store counts each event once, whatever order and however often it comes, and keeps to its bounds."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import EdgellmError
from edgellm.fleet.queries import DeviceView, FleetReader
from edgellm.fleet.store import Reject, Retention, Store
from edgellm.fleet.topics import DeviceTopics, envelope, state_event, telemetry_events
from edgellm.fleet.validate import Incoming
from edgellm.v1 import fleet_pb2
from tests.support.fleet_devices import ENGINE, orin_nano_record

TOPICS = DeviceTopics("default", "line-1", "jetson-01")
NOW_NS = 1_800_000_000 * 10**9
DAY_NS = 86_400 * 10**9


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path)) as opened:
        yield opened


def incoming(part: str, event: fleet_pb2.Event | None, *, at_ns: int = NOW_NS) -> Incoming:
    return Incoming(TOPICS, part, event, at_ns, retained=False)


def state(session: int, revision: int, *, online: bool) -> Incoming:
    said = fleet_pb2.DeviceState(online=online, session=session)
    time_ns = NOW_NS if revision else None
    return incoming("state", state_event(TOPICS, said, run=1, revision=revision, time_ns=time_ns))


def crash(sequence: int, *, run: int = 1, reason: str = "signal 9", at_ns: int = NOW_NS) -> Incoming:
    event = envelope(TOPICS, "worker", run, sequence, at_ns)
    event.worker.engine, event.worker.reason = ENGINE, reason
    return incoming("worker", event, at_ns=at_ns)


def record(sequence: int, *, run: int = 1, at_ns: int = NOW_NS, off_ns: int = 0) -> list[Incoming]:
    taken = orin_nano_record(sequence, at_ns - off_ns)
    return [incoming(name, event, at_ns=at_ns) for name, event in telemetry_events(TOPICS, run, taken)]


def view(path: Path) -> DeviceView:
    with FleetReader(path) as reader:
        (device,) = reader.devices()
        return device


def stored(path: Path) -> tuple[list[str], list[tuple[int, int, str]], DeviceView]:
    with FleetReader(path) as reader:
        (device,) = reader.devices()
        events = sorted(event.id for _, event in reader.events(TOPICS, 0, 1000))
        records = [(run, number, name) for _, run, number, name, _ in reader.telemetry(TOPICS, 0)]
    return events, records, device


def test_what_comes_twice_is_counted_once(store: Store, path: Path):
    messages = [*record(1), crash(1)]
    assert store.record(messages) == messages
    assert store.record(messages) == []
    with FleetReader(path) as reader:
        assert reader.counters() == {"recorded": 4, "duplicates": 4}
    assert stored(path)[0] == ["1-worker-1"]


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9))
def test_no_order_and_no_repetition_changes_what_is_known(
    tmp_path_factory: pytest.TempPathFactory, chance: random.Random, pieces: int
):
    said = [
        *record(1), *record(2), *record(1, run=2), crash(1), crash(2), crash(1, run=2),
        state(1, 1, online=True), state(1, 0, online=False), state(2, 1, online=True),
    ]  # fmt: skip
    mixed = said + chance.sample(said, 6)
    chance.shuffle(mixed)
    folder = tmp_path_factory.mktemp("orders")
    for name, batches in (("once", [said]), ("mixed", [mixed[i::pieces] for i in range(pieces)])):
        with closing(Store(folder / name)) as store:
            for batch in batches:
                store.record(batch)
    assert stored(folder / "mixed") == stored(folder / "once")
    newest = stored(folder / "mixed")[2]
    assert (newest.state.session, newest.online, newest.telemetry.sequence) == (2, True, 1)


def test_a_late_will_of_an_older_session_leaves_the_device_online(store: Store, path: Path):
    store.record([state(7, 4, online=True), state(6, 0, online=False)])
    assert view(path).online
    store.record([state(7, 0, online=False)])
    assert not view(path).online
    # Nor does a birth that was repeated after its session's will bring it back.
    store.record([state(7, 5, online=True)])
    assert not view(path).online
    store.record([state(8, 1, online=True)])
    assert view(path).online


def test_an_id_with_other_content_is_kept_as_a_reject_and_not_lost_silently(store: Store, path: Path):
    store.record([crash(1)])
    assert store.record([crash(1, reason="signal 11")]) == []
    with FleetReader(path) as reader:
        counters = reader.counters()
        rejects = reader.rejects(10)
    assert (counters["conflicts"], counters["rejected: id used before"]) == (1, 1)
    assert "1-worker-1 of edgellm/default/line-1/jetson-01" in rejects[0].detail


def test_an_event_that_never_came_is_missed_by_its_number(store: Store, path: Path):
    store.record([crash(3), crash(6), crash(4), crash(1, run=2)])
    with FleetReader(path) as reader:
        assert reader.missing_events(TOPICS) == 1
        store.record([crash(5)])
        assert reader.missing_events(TOPICS) == 0


def test_a_device_that_was_forgotten_starts_afresh(store: Store, path: Path):
    store.record([*record(1), crash(1)])
    store.forget(TOPICS.source)
    with FleetReader(path) as reader:
        assert reader.devices() == []
    assert len(store.record([crash(1, reason="signal 11")])) == 1


@pytest.mark.parametrize("off_s", [-86_400, 0, 86_400])
def test_the_receiver_s_clock_tells_when_and_the_skew_how_far_the_device_s_is_off(
    store: Store, path: Path, off_s: int
):
    store.record(record(1, off_ns=off_s * 10**9))
    device = view(path)
    assert (device.last_seen_ns, device.telemetry_ns, device.skew_s) == (NOW_NS, NOW_NS, off_s)


def test_records_that_waited_in_an_outbox_do_not_look_like_a_wrong_clock(store: Store, path: Path):
    store.record(record(1, off_ns=10**9))
    store.record(record(2, at_ns=NOW_NS + 10**9, off_ns=3 * 3600 * 10**9))
    assert view(path).skew_s == 1
    # A clock that was really set back shows as soon as the window is over.
    store.record(record(3, at_ns=NOW_NS + 700 * 10**9, off_ns=3600 * 10**9))
    assert view(path).skew_s == 3600


def test_what_the_broker_had_kept_is_no_sign_of_life(store: Store, path: Path):
    born = state(1, 1, online=True)
    store.record([Incoming(TOPICS, "state", born.event, NOW_NS, retained=True)])
    device = view(path)
    assert (device.online, device.last_seen_ns, device.skew_s) == (True, 0, None)
    assert not device.silent(NOW_NS + 60 * 10**9)
    assert device.silent(NOW_NS + 121 * 10**9)


def test_a_will_is_no_sign_of_life(store: Store, path: Path):
    store.record([*record(1), incoming("state", state(1, 0, online=False).event, at_ns=NOW_NS + 10**9)])
    assert view(path).last_seen_ns == NOW_NS


def test_a_cleared_wish_is_gone(store: Store, path: Path):
    wish = fleet_pb2.Event(id="d", source="edgellm/default/fleet", type="edgellm.desired.v1")
    wish.desired.generation = 4
    store.record([incoming("desired", wish)])
    assert view(path).desired == fleet_pb2.Desired(generation=4)
    store.record([incoming("desired", None)])
    assert view(path).desired is None


def test_a_batch_is_recorded_whole_or_not_at_all(store: Store, path: Path):
    with sqlite3.connect(path) as spoiler:
        spoiler.execute("CREATE TRIGGER full BEFORE INSERT ON events WHEN NEW.sequence = 2 BEGIN"
                        " SELECT RAISE(ABORT, 'disk full'); END")  # fmt: skip
    spoiler.close()
    with pytest.raises(sqlite3.Error, match="disk full"):
        store.record([crash(1), crash(2)])
    with FleetReader(path) as reader:
        assert (reader.devices(), reader.counters()) == ([], {})


def test_rejects_are_counted_for_ever_and_kept_within_a_bound(store: Store, path: Path):
    for first in range(0, 1500, 500):
        store.record([], [Reject(NOW_NS, "t", "no id", str(first + n), b"x" * 5000) for n in range(500)])
    with FleetReader(path) as reader:
        kept = reader.rejects(5000)
        assert reader.counters() == {"rejected": 1500, "rejected: no id": 1500}
    assert len(kept) == 1000
    assert kept[0].detail == "1499"
    assert len(kept[0].payload) == 512


def drained(store: Store, now_ns: int) -> None:
    while store.prune(now_ns):
        pass


def test_telemetry_goes_by_age_and_events_stay_longer(path: Path):
    with closing(Store(path, Retention(telemetry_days=7, event_days=30))) as store:
        for day in range(40):
            at_ns = NOW_NS + day * DAY_NS
            store.record([*record(day + 1, at_ns=at_ns), crash(day + 1, at_ns=at_ns)])
        drained(store, NOW_NS + 39 * DAY_NS)
    events, records, _ = stored(path)
    assert {number for _, number, _ in records} == set(range(33, 41))
    assert len(events) == 31


def test_the_file_stays_within_its_bytes_and_the_newest_are_kept(path: Path):
    bound = 400_000
    with closing(Store(path, Retention(max_bytes=bound))) as store:
        for turn in range(40):
            batch: Sequence[Incoming] = [m for n in range(100) for m in record(turn * 100 + n + 1)]
            store.record([*batch, crash(turn + 1)])
            drained(store, NOW_NS)
            assert store.used_bytes <= bound
    events, records, _ = stored(path)
    assert len(events) == 40
    numbers = [number for _, number, _ in records]
    assert (numbers[-1], numbers[0] > 3000, len(numbers) > 1000) == (4000, True, True)


def test_another_program_s_file_is_refused_and_left_as_it_is(path: Path):
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.commit()
    with pytest.raises(EdgellmError, match="another program's database"):
        Store(path)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_a_file_that_is_no_database_is_refused(path: Path):
    path.write_text("no database" * 100)
    with pytest.raises(EdgellmError, match=r"fleet\.db cannot be used"):
        Store(path)


def test_a_newer_schema_is_refused(path: Path):
    Store(path).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 9")
    with pytest.raises(EdgellmError, match="has schema 9, this version reads 1"):
        FleetReader(path)


def test_a_reader_makes_no_file(path: Path):
    with pytest.raises(EdgellmError, match="nothing was recorded yet"):
        FleetReader(path)
    assert not path.exists()


def test_two_stores_on_one_file_count_an_event_once(store: Store, path: Path):
    with closing(Store(path)) as second:
        assert second.id == store.id
        assert len(store.record([crash(1)])) + len(second.record([crash(1)])) == 1
