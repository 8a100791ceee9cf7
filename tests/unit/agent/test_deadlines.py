import asyncio

import pytest

from edgellm.v1 import worker_pb2
from edgellm_agent.engine.canary import try_engine
from edgellm_agent.errors import DeadlineError, EngineError
from edgellm_agent.services.engines import _until_silent


class HungEngine:
    """Takes a request and never answers, as a worker in a loop of its own would."""

    cancelled = False
    finished = None

    def submit(self, request, deadline_s=0):
        return self

    async def __aiter__(self):
        await asyncio.Event().wait()
        yield worker_pb2.Delta()

    async def aclose(self):
        self.cancelled = True


async def test_an_engine_that_hangs_fails_its_canary_and_is_cancelled():
    engine = HungEngine()
    with pytest.raises(EngineError, match="did not answer"):
        await asyncio.wait_for(try_engine(engine, deadline_s=0.05), 5)
    assert engine.cancelled


async def test_a_writer_that_goes_silent_is_given_up():
    async def writer():
        yield b"first"
        await asyncio.Event().wait()

    messages = _until_silent(writer(), silence_s=0.05)
    assert await asyncio.wait_for(anext(messages), 5) == b"first"
    with pytest.raises(DeadlineError, match="kept"):
        await asyncio.wait_for(anext(messages), 5)


async def test_a_writer_that_ends_is_not_waited_for():
    async def writer():
        yield b"all"

    assert [m async for m in _until_silent(writer(), silence_s=5)] == [b"all"]
