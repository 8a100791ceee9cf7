"""The governor's loop: what it tells the engine and the fleet, and that nothing ends it."""

import asyncio

from edgellm.v1 import fleet_pb2, telemetry_pb2
from edgellm_agent.engine.supervisor import Limits
from edgellm_agent.events import Events
from edgellm_agent.governor.controller import GovernorLoop
from edgellm_agent.governor.settings import GovernorSettings
from tests.support import virtual_time


class Source:
    """Records as the test gives them; ends with None."""

    def __init__(self):
        self.queue = asyncio.Queue()

    async def records(self, interval_s=0.0):
        while (record := await self.queue.get()) is not None:
            if isinstance(record, Exception):
                raise record
            yield record


class Engine:
    def __init__(self):
        self.limits, self.refusal = None, None

    def limit(self, limits, refusal=None):
        self.limits, self.refusal = limits, refusal


class Agent:
    """A loop with everything around it that it needs."""

    def __init__(self, **options):
        self.source, self.engine, self.told = Source(), Engine(), []
        events = Events()
        events.listen(self.told.append)
        self.loop = GovernorLoop(
            GovernorSettings(**options.pop("settings", {})),
            self.source,
            lambda: self.engine,
            events,
            max_sequences=8,
            headroom_bytes=1 << 20,
            clock=lambda: asyncio.get_running_loop().time(),
            **options,
        )

    async def show(self, margin=None, **fields):
        """One record, a second after the last one, and what follows from it."""
        await asyncio.sleep(1)
        now = asyncio.get_running_loop().time()
        record = telemetry_pb2.Telemetry(monotonic_ns=int(now * 1e9), **fields)
        if margin is not None:
            record.thermal.margin_celsius = margin
            record.thermal.max_celsius = 99 - margin
        self.source.queue.put_nowait(record)
        await asyncio.sleep(0.01)


def governed(test, **options):
    """Runs a test body beside a loop, in virtual time."""

    async def main():
        agent = Agent(**options)
        agent.loop.start()
        try:
            await test(agent)
        finally:
            await agent.loop.close()

    virtual_time.run(main())


def test_each_record_reaches_the_engine_and_the_part_says_the_same():
    async def body(agent):
        await agent.show(30.0)
        assert agent.engine.limits == Limits(8, 1.0)
        for _ in range(5):
            await agent.show(2.0)
        part = agent.loop.part()
        assert part.state == "HOT"
        assert part.pace == agent.engine.limits.pace < 1.0
        assert part.max_sequences == agent.engine.limits.max_sequences == 8

    governed(body)


def test_a_change_is_told_once_with_what_was_seen():
    async def body(agent):
        for margin in (30.0, 9.0, 9.0, 9.0):
            await agent.show(margin, power=telemetry_pb2.Power(total_mw=12_000))
        (change,) = agent.told
        assert isinstance(change, fleet_pb2.GovernorChanged)
        assert (change.before, change.now.state, change.now.reasons) == ("NOMINAL", "WARM", ["temperature"])
        assert (change.max_celsius, change.margin_celsius, change.power_mw) == (90.0, 9.0, 12_000)

    governed(body)


def test_a_critical_device_refuses_and_takes_requests_again_later():
    async def body(agent):
        await agent.show(0.5)
        assert "too hot" in agent.engine.refusal.message
        assert agent.engine.refusal.retry_after_s >= 10
        assert agent.loop.part().refusing
        for _ in range(12):
            await agent.show(20.0)
        assert agent.engine.refusal is None

    governed(body)


def test_another_engine_gets_the_limits_that_hold():
    async def body(agent):
        await agent.show(0.5)
        agent.engine = Engine()
        agent.loop.apply()
        assert agent.engine.limits.pace == 0.02
        assert agent.engine.refusal is not None
        agent.engine = None
        agent.loop.apply()

    governed(body)


def test_an_update_that_fails_slows_down_is_logged_and_ends_nothing(caplog):
    async def body(agent):
        await agent.show(30.0)
        update, agent.loop._governor.update = agent.loop._governor.update, None
        paces = []
        for _ in range(8):
            await agent.show(30.0)
            paces.append(agent.engine.limits.pace)
        assert paces[:3] == [0.5, 0.25, 0.125]
        assert paces[-1] == 0.02
        assert agent.told[-1].now.state == "HOT"
        agent.loop._governor.update = update
        await agent.show(30.0)
        assert agent.engine.limits.pace == 1.0

    governed(body)
    assert "governor.update_failed" in caplog.text


def test_an_engine_that_fails_ends_nothing(caplog):
    async def body(agent):
        engine, agent.engine = agent.engine, object()
        await agent.show(30.0)
        agent.engine = engine
        await agent.show(30.0)
        assert agent.engine.limits == Limits(8, 1.0)

    governed(body)
    assert "governor.apply_failed" in caplog.text


def test_without_records_a_hot_device_becomes_critical():
    async def body(agent):
        for _ in range(3):
            await agent.show(4.0)
        await asyncio.sleep(11)
        assert agent.engine.refusal is not None
        for _ in range(12):
            await agent.show(20.0)
        assert agent.engine.refusal is None

    governed(body)


def test_a_device_without_trip_points_is_told_so_once(caplog):
    async def body(agent):
        for _ in range(5):
            await agent.show(thermal=telemetry_pb2.Thermal(max_celsius=98.0))
        assert agent.engine.limits == Limits(8, 1.0)

    governed(body)
    assert caplog.text.count("governor.trip_celsius") == 1


def test_a_trip_point_from_the_settings_governs_it():
    async def body(agent):
        await agent.show(thermal=telemetry_pb2.Thermal(max_celsius=79.5))
        assert agent.engine.refusal is not None

    governed(body, settings={"trip_celsius": 80.0})


def test_records_that_fail_do_not_end_it(caplog):
    async def body(agent):
        await agent.show(4.0)
        agent.source.queue.put_nowait(RuntimeError("the sampler broke"))
        await asyncio.sleep(0.1)
        for _ in range(10):
            await agent.show(2.0)
        assert agent.engine.limits.pace < 1.0

    governed(body)
    assert "governor.records_failed" in caplog.text


def test_it_ends_with_its_source():
    async def body(agent):
        await agent.show(30.0)
        agent.source.queue.put_nowait(None)
        await asyncio.wait_for(agent.loop._task, 5)

    governed(body)
