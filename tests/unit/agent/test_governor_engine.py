"""The governor's limits on a real worker, and its refusal as clients see it."""

import asyncio
import os
import signal

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from edgellm.memory import plan_memory
from edgellm.v1 import fleet_pb2, inference_pb2, inference_pb2_grpc
from edgellm_agent.engine import worker_process
from edgellm_agent.engine.pressure import Reading
from edgellm_agent.engine.supervisor import EngineSpec, Limits, Refusal, Serving, SupervisedEngine
from edgellm_agent.errors import UnavailableError
from edgellm_agent.http.errors import to_api_error
from edgellm_agent.services.inference import InferenceServicer

HOT = Refusal("the device is too hot", 42.0)
PLENTY, NOTHING = Reading(1 << 40, 0.0), Reading(0, 0.0)


@pytest.fixture
async def started(tiny, tmp_path):
    """A real worker, a kernel that says what the test wants, and what was told of ended workers."""
    (variant,) = tiny.variants
    manifest = tiny.manifest(variant.digest)
    for layer in manifest.layers:
        (tmp_path / layer.title).hardlink_to(tiny.blob_path(layer.digest).resolve())
    config, said, told = tiny.config(manifest), [PLENTY], []
    serving = Serving(threads=1, poll_s=0.05)
    spec = EngineSpec(variant.digest, tmp_path, config, serving, read_pressure=lambda: said[0])
    plan = plan_memory(config, available_bytes=2 << 30, headroom_bytes=1 << 20, max_sequences=8)
    engine = SupervisedEngine(spec, lambda: plan, on_worker_ended=told.append)
    await engine.start()
    yield engine, said, told
    await engine.close()


@pytest.fixture
def engine(started):
    return started[0]


async def answer(engine, prompt="Hello", max_tokens=8):
    request = inference_pb2.GenerateRequest(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
    return [token async for delta in engine.submit(request) for token in delta.token_ids]


async def until(probe):
    for _ in range(1000):
        if probe():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


async def allowed(engine):
    return (await engine._worker.stats()).max_sequences


async def test_fewer_at_once_reach_the_worker_and_no_more_than_were_granted(engine):
    for asked, granted in [(3, 3), (1, 1), (50, 8), (None, 8)]:
        engine.limit(Limits(asked))
        assert await allowed(engine) == granted


async def test_memory_pressure_and_the_governor_do_not_undo_each_other(started):
    engine, said, _ = started
    engine.limit(Limits(2, 0.5))
    said[0] = NOTHING
    await until(lambda: 0 < engine.runtime().kv_bound_bytes < engine.plan.kv_bytes // 2)
    assert await allowed(engine) == 2
    low = engine.runtime().kv_bound_bytes
    engine.limit(Limits(3, 0.7))
    stats = await engine._worker.stats()
    assert (stats.max_sequences, stats.kv_bound_bytes) == (3, low)


async def test_a_paced_answer_is_the_same_text(engine):
    whole = await answer(engine, max_tokens=20)
    engine.limit(Limits(pace=0.25))
    assert await answer(engine, max_tokens=20) == whole


async def test_a_cancel_is_obeyed_while_the_worker_rests(engine):
    engine.limit(Limits(pace=0.01))
    request = inference_pb2.GenerateRequest(prompt="x", max_tokens=1000, ignore_eos=True)
    stream = engine.submit(request)
    await anext(aiter(stream))
    await stream.aclose()
    await until(lambda: engine.runtime().running_sequences == 0)
    assert engine.runtime().generated_tokens_total < 1000


async def test_a_worker_that_is_started_again_gets_the_limits_and_its_end_is_told(started):
    engine, _, told = started
    engine.limit(Limits(2))
    os.kill(engine.worker_pid, signal.SIGKILL)
    await until(lambda: told)
    await until(lambda: engine.state == "serving" and engine.worker_pid is not None)
    assert await allowed(engine) == 2
    (ended,) = told
    assert ended == fleet_pb2.WorkerEnded(
        engine=engine.spec.digest, reason="signal 9", out_of_memory=False, restarts_total=0
    )


async def test_a_worker_that_is_killed_while_the_kernel_counts_a_kill_for_memory_died_of_it(
    started, monkeypatch
):
    engine, _, told = started
    monkeypatch.setattr(worker_process, "_oom_kills", lambda: 7)
    await engine._worker.stats()
    monkeypatch.setattr(worker_process, "_oom_kills", lambda: 8)
    os.kill(engine.worker_pid, signal.SIGKILL)
    await until(lambda: told)
    assert (told[0].reason, told[0].out_of_memory) == ("signal 9", True)


async def test_another_signal_is_not_taken_for_want_of_memory(started):
    engine, _, told = started
    os.kill(engine.worker_pid, signal.SIGSEGV)
    await until(lambda: told)
    assert (told[0].reason, told[0].out_of_memory) == ("signal 11", False)


async def test_a_worker_that_the_agent_itself_kills_is_not_taken_for_want_of_memory(started):
    engine, _, told = started
    engine._worker._reader.feed_data(b"\0\0\0\1\xff")  # no message
    await until(lambda: told)
    assert (told[0].reason, told[0].out_of_memory) == ("signal 9", False)


async def test_an_engine_that_is_closed_tells_of_no_end(started):
    engine, _, told = started
    await engine.close()
    assert told == []


async def test_while_it_refuses_running_answers_go_on_and_new_ones_do_not_begin(engine):
    request = inference_pb2.GenerateRequest(prompt="x", max_tokens=200, ignore_eos=True)
    running = engine.submit(request)
    engine.limit(Limits(), HOT)
    with pytest.raises(UnavailableError, match="too hot"):
        engine.submit(request)
    assert len([t async for delta in running for t in delta.token_ids]) == 200
    engine.limit(Limits())
    assert len(await answer(engine)) == 8


async def test_a_refusal_is_unavailable_with_retry_info_over_grpc(engine, short_dir):
    class Manager:
        def engine_for(self, model):
            return engine

    engine.limit(Limits(), HOT)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(Manager()), server)
    server.add_insecure_port(f"unix:{short_dir}/s.sock")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{short_dir}/s.sock") as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                inference_pb2.GenerateRequest(prompt="x")
            )
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            trailers = dict(await call.trailing_metadata())
    finally:
        await server.stop(0)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "too hot" in error.value.details()
    status = rpc_status.status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.code == code_pb2.UNAVAILABLE
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.seconds == 42


async def test_a_refusal_is_503_with_retry_after_over_http(engine):
    engine.limit(Limits(), HOT)
    with pytest.raises(UnavailableError) as error:
        engine.submit(inference_pb2.GenerateRequest(prompt="x"))
    reply = to_api_error(error.value)
    assert (reply.status, reply.headers["retry-after"]) == (503, "42")
