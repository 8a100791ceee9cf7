"""What a worker writes is in the agent's log, at the right level, and never more than the agent can bear."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import pytest

from edgellm.v1 import worker_pb2
from edgellm_agent.engine.worker_output import WorkerOutput
from edgellm_agent.engine.worker_process import WorkerProcess
from edgellm_agent.errors import EngineError

OWN = "2026-03-01 12:00:00,123 {} edgellm_agent.worker.loop {}"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog):
    """What the log has by now: level and text."""
    caplog.set_level(logging.DEBUG, "edgellm_agent.worker")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "edgellm_agent.worker"]


async def until(probe, what: str) -> None:
    deadline_s = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.01)


async def logged(clock: Clock, *pieces: bytes) -> None:
    """Hands pieces to the reader one by one, then the end."""
    stream = asyncio.StreamReader()
    output = WorkerOutput(stream, 7, clock)
    for piece in pieces:
        stream.feed_data(piece)
        await asyncio.sleep(0)
    stream.feed_eof()
    await output.close(20)


async def test_a_line_keeps_the_level_that_the_worker_gave_it(clock, lines):
    await logged(
        clock, *(f"{OWN.format(level, 'said')}\n".encode() for level in ("DEBUG", "INFO", "WARNING", "ERROR"))
    )
    assert lines() == [
        ("DEBUG", "worker 7: said"),
        ("INFO", "worker 7: said"),
        ("WARNING", "worker 7: said"),
        ("ERROR", "worker 7: said"),
    ]


async def test_a_trace_is_an_error_to_its_end_and_other_libraries_are_heard(clock, lines):
    text = "\n".join(
        [
            OWN.format("INFO", "fine"),
            "a library's word",
            "2026-03-01 12:00:00.123456 [I:onnxruntime:Default, x.cc:1] loaded",
            "\x1b[1;31m2026-03-01 12:00:00.123456 [E:onnxruntime:, y.cc:2] no kernel\x1b[m",
            OWN.format("INFO", "still fine"),
            "Traceback (most recent call last):",
            '  File "x.py", line 1, in <module>',
            "ValueError: boom",
            OWN.format("LOUD", "a level that nobody knows"),
        ]
    )
    await logged(clock, text.encode())
    assert [level for level, _ in lines()] == [
        *("INFO", "WARNING", "INFO", "ERROR", "INFO", "ERROR", "ERROR", "ERROR", "WARNING")
    ]
    assert lines()[7] == ("ERROR", "worker 7: ValueError: boom")


async def test_lines_are_whole_however_they_come(clock, lines):
    await logged(clock, b"one\ntw", b"o\n", b"\n", b"thr", b"ee\xff")
    assert [text for _, text in lines()] == ["worker 7: one", "worker 7: two", "worker 7: three�"]


async def test_a_line_without_end_is_cut(clock, lines):
    await logged(clock, *[b"x" * 60_000] * 50, b"\nshort\n")
    long, short = (text for _, text in lines())
    assert long == f"worker 7: {'x' * 4096}"
    assert short == "worker 7: short"


async def test_of_a_flood_the_first_and_the_last_lines_are_shown_and_the_rest_counted(clock, lines):
    flood = [
        b"".join(b"%d\n" % number for number in range(start, start + 1000)) for start in range(0, 9000, 1000)
    ]
    await logged(clock, *flood, b"ValueError: boom\n")
    texts = [text for _, text in lines()]
    assert texts[:100] == [f"worker 7: {number}" for number in range(100)]
    assert texts[100] == "worker 7: 8851 lines are left out here: it writes too much"
    assert texts[101:] == [
        *(f"worker 7: {number}" for number in range(8951, 9000)),
        "worker 7: ValueError: boom",
    ]


async def test_each_second_has_room_again(clock, lines):
    stream = asyncio.StreamReader()
    output = WorkerOutput(stream, 7, clock)
    stream.feed_data(b"early\n" * 101)
    await until(lambda: len(lines()) == 100, "the first lines are not shown")
    clock.now_s += 1.5
    await until(lambda: len(lines()) == 101, "what was held back waits for more to come")
    stream.feed_data(b"late\n")
    stream.feed_eof()
    await output.close(20)
    assert [text for _, text in lines()] == ["worker 7: early"] * 101 + ["worker 7: late"]


async def test_closing_ends_a_reader_whose_stream_never_ends(clock):
    output = WorkerOutput(asyncio.StreamReader(), 7, clock)
    await output.close(0.01)
    assert output._task.done()


async def test_a_process_that_never_stops_writing_is_not_held_up(lines):
    code = "import sys\nfor _ in range(400_000): sys.stderr.write('all work and no play\\n')\nsys.exit(3)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE, limit=1 << 16
    )
    output = WorkerOutput(process.stderr, process.pid)
    assert await asyncio.wait_for(process.wait(), 60) == 3
    await output.close(20)
    shown = sum("all work" in text for _, text in lines())
    left_out = sum(int(text.split()[2]) for _, text in lines() if "left out" in text)
    assert shown + left_out == 400_000
    assert shown < 20_000


async def test_a_worker_that_cannot_load_leaves_its_trace_in_the_log(lines):
    before = len(asyncio.all_tasks())
    with pytest.raises(EngineError):
        await WorkerProcess.start(worker_pb2.Load(directory="/nowhere", config=b"{}"), 60)
    text = "\n".join(text for _, text in lines())
    assert "worker failed" in text
    assert "Traceback (most recent call last):" in text
    assert "ValidationError" in text
    # What confines it is said first.
    assert {level for level, text in lines() if "sandbox" not in text} == {"ERROR"}
    assert len(asyncio.all_tasks()) == before
