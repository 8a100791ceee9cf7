"""The agent keeps the end of its log, bounded, and hands it to readers that may be slow or go away."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from contextlib import aclosing

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from edgellm.v1 import device_pb2, device_pb2_grpc
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.errors import BusyError
from edgellm_agent.logs import LogRing, recording
from edgellm_agent.services.device import DeviceServicer, Identity

log = logging.getLogger("tests.logs")


@pytest.fixture
def ring():
    log.setLevel(logging.DEBUG)
    with recording() as ring:
        yield ring


async def texts(ring: LogRing, lines: int = 100, least: int = logging.INFO) -> list[str]:
    return [line.text async for line in ring.read(lines, least)]


async def until(probe, what: str) -> None:
    deadline_s = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.01)


async def take(found, count: int) -> list[device_pb2.LogLine]:
    return [await asyncio.wait_for(anext(found), 20) for _ in range(count)]


async def test_the_last_lines_come_in_order_with_level_logger_and_time(ring):
    for number in range(5):
        log.warning("line %d", number)
    lines = [line async for line in ring.read(2)]
    assert [(line.text, line.level, line.logger) for line in lines] == [
        ("line 3", "WARNING", "tests.logs"),
        ("line 4", "WARNING", "tests.logs"),
    ]
    assert lines[0].time.ToNanoseconds() <= lines[1].time.ToNanoseconds()


async def test_lines_are_counted_among_those_of_the_level_that_is_asked_for(ring):
    log.error("bad")
    for number in range(10):
        log.info("fine %d", number)
    log.debug("detail")
    assert await texts(ring, 2, logging.ERROR) == ["bad"]
    assert await texts(ring, 2) == ["fine 8", "fine 9"]
    assert (await texts(ring, 2, logging.DEBUG))[-1] == "detail"


async def test_a_trace_is_several_lines(ring):
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("it failed")
    lines = await texts(ring)
    assert (lines[0], lines[-1]) == ("it failed", "ValueError: boom")
    assert "Traceback (most recent call last):" in lines


async def test_no_text_can_command_a_terminal_and_none_is_too_long(ring):
    log.info("a\x1b[2Jb\x07\tc\u202ed\ud800")
    log.info("x" * 1_000_000)
    first, second = await texts(ring)
    assert first == "a[2Jb    cd"
    assert len(second) == 2000
    assert second.endswith("x…")


@given(st.lists(st.text(max_size=40), max_size=60), st.integers(1, 20), st.integers(300, 5000))
def test_the_ring_keeps_the_newest_lines_within_both_bounds(messages, max_lines, max_bytes):
    ring = LogRing(max_lines, max_bytes)
    for message in messages:
        ring.handle(logging.LogRecord("n", logging.INFO, "", 0, "%s", (message,), None))
    kept = asyncio.run(texts(ring, 10_000))
    everything = LogRing(10_000, 1 << 30)
    for message in messages:
        everything.handle(logging.LogRecord("n", logging.INFO, "", 0, "%s", (message,), None))
    written = asyncio.run(texts(everything, 10_000))
    assert len(kept) <= max_lines
    assert sum(200 + len(text.encode()) for text in kept) <= max_bytes
    assert kept == written[len(written) - len(kept) :]
    ring.close()
    everything.close()


async def test_a_record_that_cannot_be_formatted_does_not_end_the_log(ring, capsys):
    ring.handle(logging.LogRecord("n", logging.INFO, "", 0, "%d", ("no number",), None))
    log.info("and on")
    assert await texts(ring) == ["and on"]
    assert "no number" in capsys.readouterr().err


async def test_a_follower_sees_what_was_and_what_comes_from_any_thread(ring):
    log.info("before")
    async with aclosing(ring.read(10, follow=True)) as found:
        (first,) = await take(found, 1)
        threads = [threading.Thread(target=log.info, args=(f"from {number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        more = await take(found, 8)
        for thread in threads:
            thread.join()
    assert first.text == "before"
    assert {line.text for line in more} == {f"from {number}" for number in range(8)}


async def test_a_slow_follower_loses_the_oldest_lines_and_is_told_how_many(ring):
    async with aclosing(ring.read(1, follow=True)) as found:
        log.info("first")
        await take(found, 1)
        for number in range(1200):
            log.info("line %d", number)
        told, oldest, *_, newest = await take(found, 501)
    assert told.level == "WARNING"
    assert told.text.startswith("700 lines are left out")
    assert (oldest.text, newest.text) == ("line 700", "line 1199")


async def test_a_flood_is_one_callback_for_the_event_loop(ring, monkeypatch):
    loop, calls = asyncio.get_running_loop(), []
    schedule = loop.call_soon_threadsafe
    async with aclosing(ring.read(1, follow=True)) as found:
        log.info("first")
        await take(found, 1)
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(args) or schedule(*args))
        for number in range(1000):
            log.info("line %d", number)
    assert len(calls) == 1


async def test_closing_the_ring_ends_its_followers_after_what_they_have_not_read(ring):
    async with aclosing(ring.read(1, follow=True)) as found:
        log.info("first")
        await take(found, 1)
        log.info("last")
        ring.close()
        assert [line.text async for line in found] == ["last"]
    assert [line.text async for line in ring.read(1, follow=True)] == ["last"]


async def test_a_follower_that_goes_away_is_forgotten(ring):
    for _ in range(50):
        found = ring.read(1, follow=True)
        log.info("line")
        await take(found, 1)
        await found.aclose()
    followers = [ring.read(1, follow=True) for _ in range(17)]
    for found in followers[:16]:
        await take(found, 1)
    with pytest.raises(BusyError):
        await take(followers[16], 1)
    for found in followers:
        await found.aclose()


def test_a_follower_whose_loop_is_gone_harms_nobody(ring):
    async def begin() -> None:
        nonlocal found
        found = ring.read(1, follow=True)
        log.info("line")
        await take(found, 1)

    found = None
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    log.info("nobody listens")
    asyncio.run(found.aclose())


async def test_an_object_that_logs_while_it_is_collected_does_not_block_the_log(ring):
    class Talker:
        def __del__(self) -> None:
            log.info("collected")

    class Text:
        def __str__(self) -> str:
            gc.collect()
            return "text"

    talker = Talker()
    talker.self = talker
    del talker
    log.info("%s", Text())
    assert {"collected", "text"} <= set(await texts(ring))


@pytest.fixture
async def stub(ring, tmp_path):
    """The real servicer behind a real server; logs need no engine."""
    server = grpc.aio.server()
    servicer = DeviceServicer(Identity("jetson-01", "1.0"), None, None, ring, AuditLog(tmp_path))
    device_pb2_grpc.add_DeviceServiceServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix://{tmp_path}/a.sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix://{tmp_path}/a.sock") as channel:
        yield device_pb2_grpc.DeviceServiceStub(channel)
    await server.stop(None)


async def test_by_default_a_client_gets_the_last_100_lines_from_info_on(stub):
    for number in range(150):
        log.info("line %d", number)
        log.debug("detail %d", number)
    answer = [item.line.text async for item in stub.WatchLogs(device_pb2.WatchLogsRequest(), timeout=20)]
    assert answer == [f"line {number}" for number in range(50, 150)]


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (device_pb2.WatchLogsRequest(lines=2001), "lines", "at most 2000 are kept, not 2001"),
        (device_pb2.WatchLogsRequest(level="LOUD"), "level", "DEBUG, INFO, WARNING, ERROR, not 'LOUD'"),
    ],
)
async def test_a_wrong_field_is_named(stub, request_, field, words):
    with pytest.raises(grpc.aio.AioRpcError, match=words) as error:
        await stub.WatchLogs(request_, timeout=20).read()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = error_details_pb2.BadRequest()
    rpc_status.from_call(error.value).details[0].Unpack(details)
    assert details.field_violations[0].field == field


async def test_a_client_follows_until_it_goes_away(stub, ring):
    log.info("before")
    call = stub.WatchLogs(device_pb2.WatchLogsRequest(lines=1, follow=True), timeout=20)
    assert (await call.read()).line.text == "before"
    log.error("after")
    assert (await call.read()).line.text == "after"
    call.cancel()
    await until(lambda: not ring._followers, "the follower was not forgotten")
