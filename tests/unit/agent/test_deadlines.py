import asyncio

import pytest

from edgellm_agent.access.limits import until_silent
from edgellm_agent.errors import DeadlineError


async def test_a_writer_that_goes_silent_is_given_up():
    async def writer():
        yield b"first"
        await asyncio.Event().wait()

    messages = until_silent(writer(), silence_s=0.05)
    assert await asyncio.wait_for(anext(messages), 5) == b"first"
    with pytest.raises(DeadlineError, match="kept"):
        await asyncio.wait_for(anext(messages), 5)


async def test_a_writer_that_ends_is_not_waited_for():
    async def writer():
        yield b"all"

    assert [m async for m in until_silent(writer(), silence_s=5)] == [b"all"]
