import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edgellm.memory import plan_memory
from edgellm.v1 import inference_pb2
from edgellm_agent.engine.figures import Health
from edgellm_agent.engine.pressure import Reading
from edgellm_agent.engine.supervisor import EngineSpec, Serving, SupervisedEngine
from edgellm_agent.errors import DeadlineError, EngineError, InvalidError, TooLargeError, UnavailableError

PLENTY, NOTHING = Reading(1 << 40, 0.0), Reading(0, 0.0)


@pytest.fixture
async def engine(small, tmp_path):
    """A real worker, and a kernel that says what the test wants."""
    (variant,) = small.variants
    manifest = small.manifest(variant.digest)
    for layer in manifest.layers:
        (tmp_path / layer.title).hardlink_to(small.blob_path(layer.digest).resolve())
    config = small.config(manifest)
    said = [PLENTY]
    spec = EngineSpec(
        variant.digest, tmp_path, config, Serving(threads=1, poll_s=0.05), read_pressure=lambda: said[0]
    )
    plan = plan_memory(config, available_bytes=2 << 30, headroom_bytes=1 << 20, max_sequences=8)
    engine = SupervisedEngine(spec, lambda: plan)
    await engine.start()
    yield engine, said
    await engine.close()


async def answer(engine, prompt, max_tokens=8):
    request = inference_pb2.GenerateRequest(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
    stream = engine.submit(request)
    return [token async for delta in stream for token in delta.token_ids]


async def until(probe, what):
    deadline = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def test_when_others_need_memory_cached_prefixes_are_given_back_for_real(engine):
    engine, said = engine
    await asyncio.gather(*(answer(engine, f"{i} " * 400) for i in range(4)))
    await until(lambda: engine.runtime().kv_cached_bytes > 30 << 20, "no prefix was kept")
    cached, before = engine.runtime().kv_cached_bytes, engine.runtime().worker_rss_bytes
    said[0] = NOTHING
    await until(lambda: engine.runtime().kv_cached_bytes < 13 << 20, "nothing was given back")
    freed = before - engine.runtime().worker_rss_bytes
    assert freed > 0.8 * (cached - engine.runtime().kv_cached_bytes)
    said[0] = PLENTY
    await until(lambda: engine.runtime().kv_bound_bytes == engine.plan.kv_bytes, "the bound stayed low")


async def test_under_pressure_running_answers_go_on_one_after_the_other(engine):
    engine, said = engine
    calm = [await answer(engine, f"{i} " * 60, 60) for i in range(4)]
    said[0] = NOTHING
    await until(lambda: engine.runtime().kv_bound_bytes < engine.plan.kv_bytes // 4, "the bound stayed")
    pressed = await asyncio.gather(*(answer(engine, f"{i} " * 60, 60) for i in range(4)))
    assert [len(p) for p in pressed] == [60] * 4
    assert [p[:1] for p in pressed] == [c[:1] for c in calm]


async def test_a_reader_that_takes_nothing_stops_its_own_answer_at_its_credit(engine):
    engine, _ = engine
    request = inference_pb2.GenerateRequest(prompt="x", max_tokens=500, ignore_eos=True)
    stream = engine.submit(request)
    await until(lambda: engine.runtime().generated_tokens_total >= 64, "the credit was not used")
    assert len(await answer(engine, "y", 100)) == 100  # others go on
    assert engine.runtime().generated_tokens_total <= 164
    tokens = [token async for delta in stream for token in delta.token_ids]
    assert len(tokens) == 500


@asynccontextmanager
async def supervised(bundle, directory, serving, plan=None, **listeners):
    """A started engine of the bundle's."""
    (variant,) = bundle.variants
    for layer in variant.manifest.layers:
        (directory / layer.title).hardlink_to(bundle.blob_path(layer.digest))
    spec = EngineSpec(variant.digest, directory, variant.config, serving, read_pressure=lambda: PLENTY)
    fits = plan_memory(variant.config, available_bytes=2 << 30, headroom_bytes=1 << 20, max_sequences=8)
    engine = SupervisedEngine(spec, plan or (lambda: fits), **listeners)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


HASTY = Serving(threads=1, poll_s=0.05, hang_s=2)


def stop(pid):
    """Stops a process as a debugger would: it lives, and does nothing."""
    os.kill(pid, signal.SIGSTOP)


async def runs_again(engine, after):
    await until(lambda: engine.state == "serving" and engine.worker_pid not in (None, after), "no new worker")


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


async def test_a_worker_that_hangs_is_killed_its_requests_end_unavailable_and_another_takes_its_place(
    small, tmp_path
):
    told = []
    async with supervised(small, tmp_path, HASTY, on_worker_ended=told.append) as engine:
        expected = await answer(engine, "x")
        before = engine.health()
        request = inference_pb2.GenerateRequest(prompt="x", max_tokens=2000, ignore_eos=True)
        running, waiting = (engine.submit(request) for _ in range(2))
        await anext(aiter(running))
        hung = engine.worker_pid
        stop(hung)
        for stream in (running, waiting):
            with pytest.raises(UnavailableError, match="it hung: no answer within 2 s"):
                [_ async for _ in stream]
        await runs_again(engine, hung)
        assert gone(hung)
        assert engine.health() == replace(before, deaths=1, hangs=1, failed=2)
        assert (told[0].reason, told[0].out_of_memory) == ("it hung: no answer within 2 s", False)
        assert await answer(engine, "x") == expected


async def test_a_worker_that_the_kernel_does_not_let_go_holds_up_no_request_and_no_restart(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr("edgellm_agent.engine.worker_process._CLOSE_S", 0.1)
    monkeypatch.setattr("edgellm_agent.engine.worker_process._KILL_S", 0.1)
    async with supervised(small, tmp_path, HASTY) as engine:
        worker = engine._worker
        # What a SIGKILL does to a process that waits for a device.
        worker._kill = lambda: None
        try:
            stop(worker.pid)
            with pytest.raises(UnavailableError):
                await answer(engine, "x")
            await runs_again(engine, worker.pid)
            assert not gone(worker.pid)
            assert len(await answer(engine, "x")) == 8
        finally:
            os.kill(worker.pid, signal.SIGKILL)
            await worker._process.wait()


async def test_a_worker_that_is_slow_but_speaks_is_let_live(small, tmp_path):
    # Far more than it is stopped for: a busy machine gives it its turn late.
    async with supervised(small, tmp_path, Serving(threads=1, poll_s=0.05, hang_s=6)) as engine:
        for _ in range(3):
            stop(engine.worker_pid)
            await asyncio.sleep(1)
            os.kill(engine.worker_pid, signal.SIGCONT)
            assert len(await answer(engine, "x")) == 8
        assert engine.health().deaths == 0


async def test_an_agent_that_was_blocked_reads_first_and_lets_its_worker_live(small, tmp_path):
    async with supervised(small, tmp_path, HASTY) as engine:
        pid = engine.worker_pid
        # A ping is under way; the answer comes while nobody reads.
        asked = asyncio.ensure_future(engine._worker.stats())
        await asyncio.sleep(0)
        time.sleep(1.5 * HASTY.hang_s)  # noqa: ASYNC251 - that is the point
        await asked
        assert (engine.worker_pid, engine.health().deaths) == (pid, 0)


async def test_workers_that_die_in_a_loop_are_told_of_and_started_again_all_the_same(tiny, tmp_path):
    told = []
    serving = Serving(threads=1, poll_s=0.05, loop_deaths=2)
    async with supervised(tiny, tmp_path, serving, on_looping=told.append) as engine:
        for number in (1, 2):
            assert told == []
            dying = engine.worker_pid
            os.kill(dying, signal.SIGKILL)
            await until(lambda: engine.health().deaths == number, "a death was not counted")  # noqa: B023
            if number < 2:
                await runs_again(engine, dying)
        assert told == ["2 deaths of its worker within 600 s, the last: signal 9"]
        await runs_again(engine, dying)
        assert len(await answer(engine, "x")) == 8


async def test_a_start_that_fails_counts_as_a_death(tiny, tmp_path):
    told = []
    serving = Serving(threads=1, poll_s=0.05, loop_deaths=2)
    async with supervised(tiny, tmp_path, serving, on_looping=told.append) as engine:
        (tmp_path / engine.spec.config.files.graph_ragged).unlink()
        (tmp_path / engine.spec.config.files.graph).unlink()
        os.kill(engine.worker_pid, signal.SIGKILL)
        await until(lambda: told, "no loop was told")
        assert "does not start" in told[0]
        assert engine.health() == Health(deaths=2)
        assert engine.state == "restarting"


async def test_a_listener_that_fails_holds_up_no_restart(tiny, tmp_path):
    def fail(reason):
        raise RuntimeError(reason)

    serving = Serving(threads=1, poll_s=0.05, loop_deaths=1)
    async with supervised(tiny, tmp_path, serving, on_looping=fail) as engine:
        dying = engine.worker_pid
        os.kill(dying, signal.SIGKILL)
        await runs_again(engine, dying)


async def test_health_blames_the_engine_for_its_own_failures_alone(small, tmp_path):
    async with supervised(small, tmp_path, Serving(threads=1, poll_s=0.05)) as engine:
        await answer(engine, "x")
        # What the client did wrong, what it wants too soon, and what it left.
        with pytest.raises(InvalidError):
            await answer(engine, "")
        with pytest.raises(TooLargeError):
            await answer(engine, "x", 10**6)
        late = inference_pb2.GenerateRequest(prompt="x", max_tokens=2000, ignore_eos=True)
        with pytest.raises(DeadlineError):
            [_ async for _ in engine.submit(late, deadline_s=0.05)]
        await engine.submit(late).aclose()
        assert engine.health() == Health(finished=1)
        assert engine.totals.failed_requests == 3


async def test_an_engine_that_drains_and_dies_stays_down(tiny, tmp_path):
    async with supervised(tiny, tmp_path, Serving(threads=1, poll_s=0.05)) as engine:
        assert await engine.drain(5)
        os.kill(engine.worker_pid, signal.SIGKILL)
        await until(lambda: engine.worker_pid is None, "it was not noticed")
        watching = engine._tasks[0]
        await asyncio.wait({watching}, timeout=5)
        assert (watching.done(), engine.state, engine.worker_pid) == (True, "draining", None)


async def test_an_engine_that_loads_too_slowly_is_refused_and_leaves_no_process(small, tmp_path, monkeypatch):
    started = []
    begin = asyncio.create_subprocess_exec

    async def stopped_at_once(*command, **options):
        process = await begin(*command, **options)
        stop(process.pid)
        started.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", stopped_at_once)
    monkeypatch.setattr("edgellm_agent.engine.worker_process._CLOSE_S", 0.1)
    (variant,) = small.variants
    plan = plan_memory(variant.config, available_bytes=2 << 30, headroom_bytes=1 << 20)
    spec = EngineSpec(variant.digest, tmp_path, variant.config, Serving(load_timeout_s=0.2))
    with pytest.raises(EngineError, match="did not load"):
        await SupervisedEngine(spec, lambda: plan).start()
    assert [gone(pid) for pid in started] == [True]
