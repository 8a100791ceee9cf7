"""A worker hangs when it was asked and kept silent, while the agent itself was running."""

import asyncio

import pytest

from edgellm_agent.engine.watchdog import Watchdog
from tests.support import virtual_time

HANG_S = 30.0
# The last tick may end so much later.
SLACK_S = 1.5


async def hangs_at(scenario, limit_s=1000.0):
    """Second at which a worker is found to hang under a scenario; None if never."""
    loop = asyncio.get_running_loop()
    watchdog = Watchdog(HANG_S, loop.time)
    acting = asyncio.create_task(scenario(watchdog))
    try:
        await asyncio.wait_for(watchdog.until_hung(), limit_s)
    except asyncio.TimeoutError:
        return None
    finally:
        acting.cancel()
    return loop.time()


def test_a_worker_that_was_asked_and_is_silent_hangs_after_hang_s():
    async def asked(watchdog):
        await asyncio.sleep(100)
        watchdog.asked()

    assert virtual_time.run(hangs_at(asked)) == pytest.approx(100 + HANG_S, abs=SLACK_S)


def test_a_worker_that_nobody_asked_may_be_silent_for_ever():
    async def silent(watchdog):
        pass

    assert virtual_time.run(hangs_at(silent)) is None


def test_steps_of_nearly_hang_s_are_no_hang_however_many():
    async def slow(watchdog):
        while True:
            watchdog.asked()
            await asyncio.sleep(HANG_S - SLACK_S)
            watchdog.heard()

    assert virtual_time.run(hangs_at(slow)) is None


def test_whatever_comes_ends_the_silence_and_the_next_question_begins_it():
    async def once(watchdog):
        watchdog.asked()
        await asyncio.sleep(20)
        watchdog.heard()
        await asyncio.sleep(100)
        watchdog.asked()

    assert virtual_time.run(hangs_at(once)) == pytest.approx(120 + HANG_S, abs=SLACK_S)


def test_asking_again_does_not_prolong_the_silence():
    async def polled(watchdog):
        while True:
            watchdog.asked()
            await asyncio.sleep(6)

    assert virtual_time.run(hangs_at(polled)) == pytest.approx(HANG_S, abs=SLACK_S)


class Blocking:
    """A clock that can jump, as the event loop's does while the loop cannot run."""

    def __init__(self):
        self.blocked_s = 0.0

    def __call__(self):
        return asyncio.get_running_loop().time() + self.blocked_s


@pytest.mark.parametrize("before_s", [0.5, 28.0, 29.5])
def test_time_in_which_the_agent_did_not_run_does_not_count_and_what_waited_is_read_first(before_s):
    async def blocked_agent():
        clock = Blocking()
        watchdog = Watchdog(HANG_S, clock)
        hung = asyncio.create_task(watchdog.until_hung())
        watchdog.asked()
        await asyncio.sleep(before_s)
        clock.blocked_s = 1000.0
        # The answer waits in the socket; the agent reads it once it runs again.
        await asyncio.sleep(0.9)
        assert not hung.done()
        watchdog.heard()
        await asyncio.sleep(100)
        still_alive = not hung.done()
        hung.cancel()
        return still_alive

    assert virtual_time.run(blocked_agent())


def test_after_the_agent_was_blocked_a_silent_worker_is_found_all_the_same():
    async def blocked_agent():
        clock = Blocking()
        watchdog = Watchdog(HANG_S, clock)
        watchdog.asked()
        hung = asyncio.create_task(watchdog.until_hung())
        await asyncio.sleep(10.5)
        clock.blocked_s = 1000.0
        await hung
        return asyncio.get_running_loop().time()

    assert virtual_time.run(blocked_agent()) == pytest.approx(HANG_S + 1, abs=SLACK_S)
