import asyncio
import time

import pytest

from edgellm.memory import plan_memory
from edgellm.v1 import inference_pb2
from edgellm_agent.engine.pressure import Reading
from edgellm_agent.engine.supervisor import EngineSpec, Serving, SupervisedEngine

PLENTY, NOTHING = Reading(1 << 40, 0.0), Reading(0, 0.0)


@pytest.fixture
async def engine(small, tmp_path):
    """A real worker, and a kernel that says what the test wants."""
    (variant,) = small.variants
    manifest = small.manifest(variant.digest)
    for layer in manifest.layers:
        (tmp_path / layer.title).symlink_to(small.blob_path(layer.digest).resolve())
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
