"""What one caller may take at once."""

import asyncio
import contextlib
import functools

import pytest

from edgellm.v1 import engines_pb2
from edgellm_agent.access import interceptor
from edgellm_agent.access import limits as module
from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.access.interceptor import AccessInterceptor
from edgellm_agent.access.limits import Limits, until_silent
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.errors import BusyError, DeadlineError


def test_a_caller_has_so_many_calls_and_another_one_has_its_own():
    limits = Limits(AccessSettings(max_calls=2))
    with limits.call("a", endless=False), limits.call("a", endless=False):
        with pytest.raises(BusyError, match="a has 2 calls already") as error:
            limits.call("a", endless=False).__enter__()
        assert error.value.retry_after_s > 0
        with limits.call("b", endless=False):
            pass
    with limits.call("a", endless=False):
        pass


def test_streams_without_end_are_fewer_and_leave_calls_to_their_caller():
    limits = Limits(AccessSettings(max_calls=3, max_streams=1))
    with limits.call("a", endless=True):
        with pytest.raises(BusyError, match="1 open streams"):
            limits.call("a", endless=True).__enter__()
        with limits.call("a", endless=False), limits.call("a", endless=False):
            pass


def test_a_refused_call_is_not_counted():
    limits = Limits(AccessSettings(max_calls=3, max_streams=1))
    with limits.call("a", endless=True):
        for _ in range(5):
            with contextlib.suppress(BusyError), limits.call("a", endless=True):
                pass
        with limits.call("a", endless=False), limits.call("a", endless=False):
            pass


def test_nothing_is_kept_of_callers_that_are_gone():
    limits = Limits(AccessSettings())
    for name in map(str, range(100)):
        with limits.call(name, endless=True):
            pass
    assert not limits._calls
    assert not limits._streams


class Time:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds):
        self.now += seconds

    def __call__(self):
        return self.now


async def upload(limits, name, chunks, size=100_000):
    async def messages():
        for _ in range(chunks):
            yield engines_pb2.WriteBlobRequest(chunk=bytes(size))

    return [message async for message in limits.paced(name, messages())]


async def test_an_upload_comes_at_the_rate_that_is_allowed(monkeypatch):
    clock = Time(monkeypatch)
    limits = Limits(AccessSettings(upload_bytes_per_s=100_000), clock)
    assert len(await upload(limits, "a", 11)) == 11
    # The first second's bytes come at once.
    assert clock.now - 100 == pytest.approx(10, rel=0.01)


async def test_several_uploads_of_a_caller_share_the_rate_and_others_have_their_own(monkeypatch):
    clock = Time(monkeypatch)
    limits = Limits(AccessSettings(upload_bytes_per_s=100_000), clock)
    for _ in range(3):
        await upload(limits, "a", 1)
    assert clock.now - 100 == pytest.approx(2, rel=0.01)
    await upload(limits, "b", 1)
    assert clock.now - 100 == pytest.approx(2, rel=0.01)


async def test_time_in_which_nothing_came_is_not_saved_up(monkeypatch):
    clock = Time(monkeypatch)
    limits = Limits(AccessSettings(upload_bytes_per_s=100_000), clock)
    await upload(limits, "a", 1)
    clock.now += 1000
    began = clock.now
    await upload(limits, "a", 3)
    assert clock.now - began == pytest.approx(2, rel=0.01)


async def test_without_a_rate_the_messages_are_left_alone():
    async def messages():
        yield 1

    given = messages()
    assert Limits(AccessSettings()).paced("a", given) is given
    await given.aclose()


async def test_an_upload_that_is_held_up_for_long_has_not_fallen_silent(monkeypatch):
    monkeypatch.setattr(interceptor, "until_silent", functools.partial(until_silent, silence_s=0.1))
    guard = AccessInterceptor(None, Limits(AccessSettings(upload_bytes_per_s=1_000_000)), None)

    async def messages():
        for _ in range(2):
            yield engines_pb2.WriteBlobRequest(chunk=bytes(1_000_000))
        await asyncio.Event().wait()

    given = guard._upload(Caller("a", Role.OPERATOR), "EngineService/WriteBlob", messages())
    for _ in range(2):
        await asyncio.wait_for(anext(given), 20)
    # Its own silence still ends it.
    with pytest.raises(DeadlineError):
        await asyncio.wait_for(anext(given), 20)
