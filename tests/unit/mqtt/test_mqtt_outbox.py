"""The outbox: bounded in bytes, oldest telemetry first, events never; nothing lost by a damaged neighbour."""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edgellm_agent.mqtt.outbox import Message, Outbox, Stored, Waiting

LIMIT = 2000


def message(number: int, *, is_event: bool = False, length: int = 100) -> Message:
    return Message(f"t/{number}", bytes(length), is_event, created_ns=number, correlation_data=b"7")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def test_what_was_added_is_there_in_order_after_another_start(path: Path) -> None:
    first = Outbox(path, LIMIT)
    added = [message(1), message(2, is_event=True), message(3)]
    first.add(added)
    first.close()
    again = Outbox(path, LIMIT)
    again.open()
    assert again.waiting == Waiting(1, 2, sum(entry.size_bytes for entry in added))
    assert [entry.message for entry in again.oldest(events=True)] == [added[1]]
    telemetry = again.oldest(events=False)
    assert [entry.message for entry in telemetry] == [added[0], added[2]]
    assert again.oldest(events=False, after=telemetry[0].key) == telemetry[1:]
    assert again.oldest(events=False, limit=1) == telemetry[:1]


def test_a_key_is_never_given_twice(path: Path) -> None:
    outbox = Outbox(path, LIMIT)
    outbox.add([message(1)])
    (old,) = outbox.oldest(events=False)
    outbox.delete([old.key])
    outbox.add([message(2)])
    (new,) = outbox.oldest(events=False)
    # An acknowledgement of the old one that comes late must not delete the new one.
    assert new.key > old.key


def test_when_it_is_full_the_oldest_telemetry_goes_and_events_stay(path: Path) -> None:
    outbox = Outbox(path, limit_bytes=5 * message(1).size_bytes)
    assert outbox.add([message(1), message(2, is_event=True), message(3), message(4), message(5)]) == 0
    assert outbox.add([message(6, is_event=True), message(7)]) == 2
    assert [entry.message.topic for entry in outbox.oldest(events=False)] == ["t/4", "t/5", "t/7"]
    assert outbox.waiting.events == 2


def test_events_alone_may_go_beyond_the_bound_and_leave_no_room_for_telemetry(path: Path) -> None:
    outbox = Outbox(path, limit_bytes=message(1).size_bytes)
    assert outbox.add([message(number, is_event=True) for number in range(3)]) == 0
    assert outbox.add([message(4)]) == 1
    assert (outbox.waiting.events, outbox.waiting.telemetry) == (3, 0)


@pytest.mark.parametrize("damage", [b"no database" * 1000, bytes(8192)])
def test_a_damaged_file_is_moved_aside_and_told(
    path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(damage)
    outbox = Outbox(path, LIMIT)
    outbox.add([message(1)])
    assert outbox.waiting.telemetry == 1
    outbox.close()
    assert path.with_name("outbox.db.damaged").read_bytes() == damage
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "mqtt.outbox_damaged" in caplog.text


def test_a_file_that_is_damaged_while_it_is_open_is_replaced_at_the_next_call(path: Path) -> None:
    outbox = Outbox(path, 1 << 30)
    # More than SQLite keeps in memory.
    outbox.add([message(number, length=100_000) for number in range(100)])
    outbox.close()
    outbox.open()
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 9_000_000)
    with pytest.raises(sqlite3.OperationalError, match="begun anew"):
        outbox.oldest(events=False, limit=100)
    outbox.add([message(1)])
    assert outbox.waiting == Waiting(0, 1, message(1).size_bytes)
    assert path.with_name("outbox.db.damaged").exists()


def test_the_file_of_another_version_is_not_touched_but_moved(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    Outbox(path, LIMIT).add([message(1)])
    kept = sqlite3.connect(path.with_name("outbox.db.damaged"))
    assert kept.execute("PRAGMA user_version").fetchone() == (99,)
    kept.close()


def test_a_full_disk_refuses_whole_calls_and_works_again_once_there_is_room(path: Path) -> None:
    outbox = Outbox(path, 1 << 20)
    outbox.add([message(1)])
    before = outbox.waiting
    _limit_pages(outbox, 1)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        outbox.add([message(2, length=20_000), message(3)])
    assert outbox.waiting == before
    assert [entry.message.topic for entry in outbox.oldest(events=False)] == ["t/1"]
    _limit_pages(outbox, 10_000)
    outbox.add([message(4)])
    assert [entry.message.topic for entry in outbox.oldest(events=False)] == ["t/1", "t/4"]


def test_a_folder_that_is_not_there_is_an_error_until_it_is(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "absent" / "outbox.db", LIMIT)
    with pytest.raises(sqlite3.OperationalError):
        outbox.add([message(1)])
    (tmp_path / "absent").mkdir()
    outbox.add([message(1)])
    assert outbox.waiting.telemetry == 1


def _limit_pages(outbox: Outbox, pages: int) -> None:
    """SQLite's own way to make a disk full: the same error, from the same place."""
    assert outbox._db is not None
    outbox._db.execute(f"PRAGMA max_page_count = {pages}")


class OutboxAgainstAModel(RuleBasedStateMachine):
    """Whatever is added, deleted and opened again: what is there is what a list would have."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "outbox.db"
        self.outbox = Outbox(self.path, LIMIT)
        self.outbox.open()
        self.model: list[Message] = []
        self.numbers = itertools.count()

    def teardown(self) -> None:
        self.outbox.close()
        self.folder.cleanup()

    @rule(kinds=st.lists(st.tuples(st.booleans(), st.integers(0, 700)), max_size=5))
    def add(self, kinds: list[tuple[bool, int]]) -> None:
        new = [message(next(self.numbers), is_event=is_event, length=length) for is_event, length in kinds]
        self.model += new
        dropped = 0
        while self._bytes() > LIMIT and any(not entry.is_event for entry in self.model):
            self.model.remove(next(entry for entry in self.model if not entry.is_event))
            dropped += 1
        assert self.outbox.add(new) == dropped

    @rule(target=keys, events=st.booleans(), limit=st.integers(1, 4))
    def look(self, events: bool, limit: int) -> list[Stored]:
        found = self.outbox.oldest(events=events, limit=limit)
        assert [entry.message for entry in found] == self._of_kind(events)[:limit]
        return found

    @rule(found=consumes(keys))
    def acknowledge(self, found: list[Stored]) -> None:
        self.outbox.delete([entry.key for entry in found])
        gone = {entry.message.created_ns for entry in found}
        self.model = [entry for entry in self.model if entry.created_ns not in gone]

    @rule()
    def start_again(self) -> None:
        self.outbox.close()
        self.outbox = Outbox(self.path, LIMIT)
        self.outbox.open()

    @invariant()
    def what_waits_is_counted(self) -> None:
        expected = Waiting(len(self._of_kind(True)), len(self._of_kind(False)), self._bytes())
        assert self.outbox.waiting == expected

    @invariant()
    def each_kind_is_in_its_order(self) -> None:
        for events in (True, False):
            there = self.outbox.oldest(events=events, limit=1000)
            assert [entry.message for entry in there] == self._of_kind(events)

    def _of_kind(self, events: bool) -> list[Message]:
        return [entry for entry in self.model if entry.is_event == events]

    def _bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.model)


TestOutboxAgainstAModel = OutboxAgainstAModel.TestCase
TestOutboxAgainstAModel.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
