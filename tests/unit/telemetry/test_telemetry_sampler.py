"""One record per interval, whatever sensors and readers do."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from itertools import cycle
from pathlib import Path

import pytest
from google.protobuf.message import Message

from edgellm.v1 import telemetry_pb2
from edgellm_agent.telemetry.base import Clock, Part, PartName
from edgellm_agent.telemetry.rounding import round_floats
from edgellm_agent.telemetry.sampler import Sampler, next_due
from edgellm_agent.telemetry.sysfs import SysfsSource
from tests.support import boards
from tests.support.telemetry_records import full_record


class FakeProbe:
    def __init__(self, part: PartName, answer: Callable[[], Part | None]) -> None:
        self.part = part
        self.read = answer


class FakeSource:
    name = "fake"

    def __init__(self, *probes: FakeProbe) -> None:
        self.probes = probes


def heat() -> FakeProbe:
    return FakeProbe("thermal", lambda: telemetry_pb2.Thermal(max_celsius=50.0))


async def take(sampler: Sampler, count: int, interval_s: float = 0.0) -> list[telemetry_pb2.Telemetry]:
    records = []
    async with asyncio.timeout(20) if hasattr(asyncio, "timeout") else _Forever():
        async for record in sampler.records(interval_s):
            records.append(record)
            if len(records) == count:
                break
    return records


class _Forever:
    """Python 3.10 has no asyncio.timeout; pytest's own deadline holds there."""

    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: object) -> None: ...


@pytest.fixture
async def sampling() -> AsyncIterator[Callable[..., Sampler]]:
    samplers: list[Sampler] = []

    def start(*args: object, **options: object) -> Sampler:
        samplers.append(Sampler(*args, **options))  # type: ignore[arg-type]
        samplers[-1].start()
        return samplers[-1]

    yield start
    for sampler in samplers:
        await asyncio.wait_for(sampler.close(), 2)


async def test_records_count_up_and_carry_both_clocks_and_the_engine(
    sampling: Callable[..., Sampler],
) -> None:
    clock = Clock(wall_ns=lambda: 1_700_000_000_123_456_789)
    runtime = telemetry_pb2.Runtime(state="serving", decode_tokens_per_s=12.5)
    governor = telemetry_pb2.Governor(state="WARM", reasons=["temperature"], pace=0.5)
    before = time.monotonic_ns()
    sampler = sampling(
        FakeSource(heat()), lambda: runtime, governor=lambda: governor, interval_s=0.02, clock=clock
    )
    records = await take(sampler, 3)
    assert [record.sequence for record in records] == [1, 2, 3]
    assert records[0].time.ToNanoseconds() == 1_700_000_000_123_456_789
    assert before <= records[0].monotonic_ns < records[1].monotonic_ns <= time.monotonic_ns()
    assert records[0].runtime == runtime
    assert records[0].governor == governor
    assert records[0].thermal.max_celsius == 50.0
    assert not records[0].HasField("power")


def test_the_schedule_does_not_drift_and_does_not_catch_up() -> None:
    assert next_due(1000, 1003, 10) == 1010
    assert next_due(1000, 1010, 10) == 1020
    # A stall of three intervals costs three records and no burst after it.
    assert next_due(1000, 1035, 10) == 1040


async def test_the_time_that_reading_takes_does_not_lengthen_the_interval(
    sampling: Callable[..., Sampler],
) -> None:
    now_ns = 0
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now_ns
        slept.append(seconds)
        now_ns += round(seconds * 1e9)
        await asyncio.sleep(0.001)

    def slow() -> telemetry_pb2.Thermal:
        nonlocal now_ns
        now_ns += 300_000_000
        return telemetry_pb2.Thermal(max_celsius=50.0)

    clock = Clock(monotonic_ns=lambda: now_ns, sleep=sleep)
    records = await take(sampling(FakeSource(FakeProbe("thermal", slow)), interval_s=1.0, clock=clock), 4)
    assert [record.monotonic_ns for record in records] == [0, 1_000_000_000, 2_000_000_000, 3_000_000_000]
    assert slept[:3] == [0.7, 0.7, 0.7]


async def test_a_wedged_sensor_costs_its_part_and_nothing_else(
    tmp_path: Path, sampling: Callable[..., Sampler]
) -> None:
    boards.build(tmp_path, boards.ORIN_NANO)
    wedged = tmp_path / "sys/class/thermal/thermal_zone1/temp"
    wedged.unlink()
    os.mkfifo(wedged)  # opening it for reading waits for a writer
    sampler = sampling(SysfsSource(tmp_path), interval_s=0.05, deadline_s=0.2)
    records = await take(sampler, 10)
    assert not any(record.HasField("thermal") for record in records)
    assert all(record.power.total_mw == 4959.4 and record.HasField("memory") for record in records)
    assert sum(thread.name == "telemetry-reading" for thread in threading.enumerate()) <= 2
    # It answers again: the thread that waited comes back, and so does the part.
    wedged_again = await asyncio.to_thread(_answer, wedged)
    async for record in sampler.records():
        if record.HasField("thermal"):
            break
    assert wedged_again


def _answer(fifo: Path) -> bool:
    with fifo.open("w") as writer:
        fifo.unlink()
        fifo.write_text("47250\n")
        writer.write("47250\n")
    return True


def test_a_wedged_sensor_does_not_keep_the_agent_from_ending(tmp_path: Path) -> None:
    boards.build(tmp_path, boards.ORIN_NANO)
    wedged = tmp_path / "proc/meminfo"
    wedged.unlink()
    os.mkfifo(wedged)
    program = f"""
import asyncio
from pathlib import Path
from edgellm_agent.telemetry.rounding import round_floats
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.telemetry.sysfs import SysfsSource

async def main():
    sampler = Sampler(SysfsSource(Path({str(tmp_path)!r})), deadline_s=0.1)
    sampler.start()
    async for record in sampler.records():
        break
    await sampler.close()

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=15)


async def test_close_waits_for_no_wedged_sensor(sampling: Callable[..., Sampler]) -> None:
    read, release, freed = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def wedge() -> None:
        loop.call_soon_threadsafe(read.set)
        freed.append(release.wait(60))

    sampler = sampling(FakeSource(FakeProbe("power", wedge)), deadline_s=60)
    await read.wait()
    await sampler.close()
    assert not freed
    release.set()


async def test_a_probe_that_fails_takes_no_other_along(
    sampling: Callable[..., Sampler], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("bug")

    sampler = sampling(
        FakeSource(FakeProbe("power", fail), heat()),
        fail,  # the agent's side fails, too
        governor=fail,
        uplink=lambda: telemetry_pb2.Uplink(connected=True),
        interval_s=0.02,
    )
    records = await take(sampler, 2)
    assert all(record.thermal.max_celsius == 50.0 for record in records)
    assert all(record.uplink.connected for record in records)
    assert not any(record.HasField(part) for record in records for part in ("power", "runtime", "governor"))
    assert "telemetry.probe_failed part=power" in caplog.text
    assert "telemetry.part_failed part=runtime" in caplog.text
    assert "telemetry.part_failed part=governor" in caplog.text


async def test_reading_does_not_hold_the_event_loop(sampling: Callable[..., Sampler]) -> None:
    read, let_go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wedge() -> telemetry_pb2.Power:
        loop.call_soon_threadsafe(read.set)
        # Only the event loop can let it go: were that held up, the part would be missing.
        assert let_go.wait(20)
        return telemetry_pb2.Power(total_mw=1)

    sampler = sampling(FakeSource(FakeProbe("power", wedge)), interval_s=60, deadline_s=20)
    await read.wait()
    let_go.set()
    assert (await take(sampler, 1))[0].power.total_mw == 1


def stepping_clock() -> Clock:
    """Time that passes only while the sampler sleeps; readers have their turn in between."""
    now_ns = 0

    async def sleep(seconds: float) -> None:
        nonlocal now_ns
        now_ns += round(seconds * 1e9)
        await asyncio.sleep(0.001)

    return Clock(monotonic_ns=lambda: now_ns, sleep=sleep)


async def test_a_slow_reader_misses_records_and_delays_nobody(sampling: Callable[..., Sampler]) -> None:
    sampler = sampling(FakeSource(heat()), clock=stepping_clock())
    slow: list[int] = []
    twice = asyncio.Event()

    async def dawdle() -> None:
        async for record in sampler.records():
            slow.append(record.sequence)
            if len(slow) == 2:
                twice.set()
            await others_are_done.wait()

    others_are_done = asyncio.Event()
    dawdler = asyncio.create_task(dawdle())
    records = await take(sampler, 25)
    assert [record.sequence for record in records] == list(range(1, 26))
    assert slow == [1]
    # After its pause it gets what is latest now, not what it missed.
    others_are_done.set()
    await asyncio.wait_for(twice.wait(), 20)
    assert slow[1] >= 25
    dawdler.cancel()


async def test_each_reader_has_its_own_interval(sampling: Callable[..., Sampler]) -> None:
    sampler = sampling(FakeSource(heat()), interval_s=1, clock=stepping_clock())
    every, some = await asyncio.gather(take(sampler, 16), take(sampler, 4, interval_s=5))
    assert [record.sequence for record in every] == list(range(1, 17))
    assert [record.sequence for record in some] == [1, 6, 11, 16]


async def test_a_record_that_is_a_little_early_is_not_missed(sampling: Callable[..., Sampler]) -> None:
    now_ns, jitter_ns = 0, cycle((3_000_000, -3_000_000))

    async def sleep(seconds: float) -> None:
        nonlocal now_ns
        now_ns += round(seconds * 1e9) + next(jitter_ns)
        await asyncio.sleep(0.005)

    clock = Clock(monotonic_ns=lambda: now_ns, sleep=sleep)
    records = await take(sampling(FakeSource(heat()), interval_s=1.0, clock=clock), 6, interval_s=1.0)
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5, 6]


async def test_readers_end_when_the_sampler_closes(sampling: Callable[..., Sampler]) -> None:
    sampler = sampling(FakeSource(heat()), interval_s=60)
    reader = asyncio.create_task(take(sampler, 1000))
    await asyncio.sleep(0.05)
    await sampler.close()
    assert len(await asyncio.wait_for(reader, 1)) == 1


async def test_the_latest_record_is_there_for_whoever_asks(sampling: Callable[..., Sampler]) -> None:
    sampler = sampling(FakeSource(heat()), interval_s=60)
    assert sampler.latest is None
    await take(sampler, 1)
    assert sampler.latest is not None
    assert sampler.latest.sequence == 1


async def test_energy_and_what_it_was_good_for_are_in_the_record(sampling: Callable[..., Sampler]) -> None:
    now_ns = 0

    async def sleep(seconds: float) -> None:
        nonlocal now_ns
        now_ns += round(seconds * 1e9)
        await asyncio.sleep(0.001)

    def runtime() -> telemetry_pb2.Runtime:
        return telemetry_pb2.Runtime(generated_tokens_total=now_ns // 100_000_000)

    ten_watts = FakeProbe("power", lambda: telemetry_pb2.Power(total_mw=10_000))
    clock = Clock(monotonic_ns=lambda: now_ns, sleep=sleep)
    records = await take(sampling(FakeSource(ten_watts), runtime, clock=clock), 4)
    assert [record.power.energy_total_j for record in records] == [0, 10, 20, 30]
    assert [record.runtime.tokens_per_joule for record in records] == [0, 1, 1, 1]


async def test_floats_have_no_more_digits_than_sensors_can_tell(sampling: Callable[..., Sampler]) -> None:
    zone = telemetry_pb2.ThermalZone(name="cpu", celsius=47.199999999999996, passive_celsius=99)
    power = telemetry_pb2.Power(rails=[telemetry_pb2.PowerRail(name="VDD", power_mw=4959.359999)])
    probes = (
        FakeProbe("thermal", lambda: telemetry_pb2.Thermal(zones=[zone], margin_celsius=51.80000000000001)),
        FakeProbe("power", lambda: power),
    )

    def runtime() -> telemetry_pb2.Runtime:
        return telemetry_pb2.Runtime(
            decode_tokens_per_s=12.3456789, time_to_first_token=telemetry_pb2.Percentiles(p50_s=0.1234567891)
        )

    (record,) = await take(sampling(FakeSource(*probes), runtime), 1)
    assert (record.thermal.zones[0].celsius, record.thermal.margin_celsius) == (47.2, 51.8)
    assert record.power.rails[0].power_mw == 4959.4
    assert record.runtime.decode_tokens_per_s == 12.35
    assert record.runtime.time_to_first_token.p50_s == 0.123457


def test_every_float_of_a_record_is_rounded() -> None:
    def thirds(message: Message) -> None:
        for field, value in message.ListFields():
            if field.message_type:
                for inner in [value] if isinstance(value, Message) else value:
                    thirds(inner)
            elif isinstance(value, float):
                setattr(message, field.name, value / 3 + 1 / 7)

    record = full_record()
    thirds(record)
    assert re.search(r"\.\d{7}", str(record))
    round_floats(record)
    assert not re.search(r"\.\d{7}", str(record))
    assert not record.governor.pace.is_integer()
