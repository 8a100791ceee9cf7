"""The outbox in front of the event loop: what is on disk when, and what a failing disk costs."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edgellm.v1 import telemetry_pb2
from edgellm_agent.mqtt import backlog as module
from edgellm_agent.mqtt.backlog import Backlog
from edgellm_agent.mqtt.outbox import Message, Outbox, Stored
from tests.support.publishing import until


def event(number: int) -> Message:
    return Message(f"evt/{number}", b"e", is_event=True, created_ns=number)


def telemetry(number: int, length: int = 10) -> Message:
    return Message(f"tele/{number}", bytes(length), is_event=False, created_ns=number)


@contextlib.asynccontextmanager
async def opened(path: Path, limit_bytes: int = 1 << 20) -> AsyncIterator[Backlog]:
    backlog = Backlog(path, limit_bytes)
    backlog.start()
    yield backlog
    await backlog.close(5)


def on_disk(path: Path) -> list[str]:
    """What another process finds now."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        if db.execute("PRAGMA user_version").fetchone() == (0,):
            return []
        rows = db.execute("SELECT topic FROM messages ORDER BY id").fetchall()
    return [topic for (topic,) in rows]


def part_of(backlog: Backlog) -> telemetry_pb2.Uplink:
    part = telemetry_pb2.Uplink()
    backlog.fill(part)
    return part


async def test_an_event_is_on_disk_before_it_is_given_out(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as backlog:
        backlog.add_event(event(1))
        given: list[Stored] = []
        for _ in range(1000):
            given += await backlog.take(8)
            if given:
                break
        assert [entry.message.topic for entry in given] == on_disk(path) == ["evt/1"]
        assert await backlog.take(8) == []


async def test_telemetry_waits_in_memory_and_goes_to_disk_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as backlog:
        backlog.add_telemetry(telemetry(1))
        backlog.add_event(event(1))
        # An event's commit takes along what waits: one sync for both.
        await until(lambda: len(on_disk(path)) == 2)
        backlog.add_telemetry(telemetry(2))
        assert on_disk(path) == ["evt/1", "tele/1"]
        assert part_of(backlog).queued_telemetry == 2
        monkeypatch.setattr(module, "_COMMIT_S", 0.0)
        backlog.add_telemetry(telemetry(3))
        await until(lambda: len(on_disk(path)) == 4)


async def test_closing_puts_everything_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as backlog:
        for number in range(10):
            backlog.add_telemetry(telemetry(number))
        backlog.add_event(event(1))
    assert len(on_disk(path)) == 11


async def test_much_telemetry_does_not_wait_for_its_batch(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as backlog:
        for number in range(4):
            backlog.add_telemetry(telemetry(number, length=100_000))
        await until(lambda: len(on_disk(path)) == 4)


async def test_events_are_given_first_and_each_kind_in_its_order(tmp_path: Path) -> None:
    async with opened(tmp_path / "outbox.db") as backlog:
        for number in range(3):
            backlog.add_telemetry(telemetry(number))
            backlog.add_event(event(number))
        await until(lambda: not backlog._events)
        given = await backlog.take(4) + await backlog.take(4)
        assert [entry.message.topic for entry in given] == [
            "evt/0", "evt/1", "evt/2", "tele/0", "tele/1", "tele/2"
        ]  # fmt: skip
        backlog.rewind()
        assert await backlog.take(6) == given


async def test_what_the_broker_has_is_forgotten_and_not_given_again(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    async with opened(path) as backlog:
        for number in range(3):
            backlog.add_event(event(number))
        await until(lambda: not backlog._events)
        first, *_ = await backlog.take(8)
        backlog.forget(first.key)
        await until(lambda: on_disk(path) == ["evt/1", "evt/2"])
        backlog.rewind()
        assert [entry.message.topic for entry in await backlog.take(8)] == ["evt/1", "evt/2"]


async def test_telemetry_that_was_dropped_is_counted_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "outbox.db", limit_bytes=3 * telemetry(1).size_bytes) as backlog:
        for number in range(5):
            backlog.add_telemetry(telemetry(number))
        backlog.rewind()
        await until(lambda: part_of(backlog).dropped_telemetry_total == 2)
        backlog.add_telemetry(telemetry(5))
        backlog.rewind()
        await until(lambda: part_of(backlog).dropped_telemetry_total == 3)
        assert [entry.message.topic for entry in await backlog.take(8)] == ["tele/3", "tele/4", "tele/5"]
    assert caplog.text.count("mqtt.outbox_full") == 1


async def test_a_disk_that_fails_keeps_events_in_memory_and_gives_them_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.05)
    folder = tmp_path / "absent"
    async with opened(folder / "outbox.db") as backlog:
        backlog.add_telemetry(telemetry(1))
        backlog.add_event(event(1))
        backlog.add_event(event(2))
        await until(lambda: part_of(backlog).dropped_telemetry_total == 1)
        first, second = await backlog.take(8)
        assert (first.message, second.message) == (event(1), event(2))
        assert await backlog.take(8) == []
        backlog.forget(first.key)
        folder.mkdir()
        await until(lambda: (folder / "outbox.db").exists() and on_disk(folder / "outbox.db") == ["evt/2"])
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "mqtt.outbox_fails",
        "mqtt.outbox_works_again",
    ]


async def test_events_that_memory_cannot_hold_are_told_as_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path / "absent" / "outbox.db") as backlog:
        for number in range(1001):
            backlog.add_event(event(number))
        assert part_of(backlog).queued_events == 1000
    assert "mqtt.event_lost topic=evt/1000 waiting=1000" in caplog.text
    assert "mqtt.events_lost events=1000" in caplog.text


async def test_the_event_loop_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that takes as long as the test wants, and a loop that goes on meanwhile."""
    slow, add = threading.Event(), Outbox.add

    def slowly(self: Outbox, messages: list[Message]) -> int:
        assert slow.wait(10)
        return add(self, messages)

    monkeypatch.setattr(Outbox, "add", slowly)
    async with opened(tmp_path / "outbox.db") as backlog:
        backlog.add_event(event(1))
        for number in range(100):
            await asyncio.sleep(0)
            backlog.add_telemetry(telemetry(number))
        assert part_of(backlog).queued_events == 1
        slow.set()
        await until(lambda: not backlog._events)
