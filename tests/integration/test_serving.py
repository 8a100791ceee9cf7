"""What an application sees of a serving agent, and what happens when parts of it die."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edgellm.client import AsyncClient, Message, Sampling
from edgellm.errors import RemoteError
from edgellm.v1 import inference_pb2, inference_pb2_grpc
from tests.conftest import push
from tests.support.agents import gone, running_agent, wait_for


def text_of(client, prompt="Hello", **options):
    with client.generate(prompt, **options) as answer:
        for _ in answer:
            pass
        return answer.completion


def runtime(client):
    return next(client.watch_telemetry(timeout_s=5)).runtime


def test_greedy_text_is_the_same_each_time_and_in_company(serving):
    prompts = [f"Prompt number {i}, " * (i + 1) for i in range(6)]
    with serving.client() as client:
        alone = [text_of(client, p, max_tokens=24, ignore_eos=True) for p in prompts]

    async def together():
        async with AsyncClient(serving.target) as client:

            async def one(prompt):
                async with client.generate(prompt, max_tokens=24, ignore_eos=True) as answer:
                    ids = [t async for chunk in answer for t in chunk.token_ids]
                return ids, answer.completion

            return await asyncio.gather(*(one(p) for p in prompts))

    for (ids, in_company), before in zip(asyncio.run(together()), alone, strict=True):
        assert len(ids) == before.completion_tokens == 24
        assert in_company.text == before.text


def test_usage_and_timings_close_the_stream(serving):
    with serving.client() as client:
        done = text_of(client, "one two three", max_tokens=7, ignore_eos=True)
    assert (done.finish_reason, done.completion_tokens) == ("length", 7)
    assert done.prompt_tokens > 3
    assert done.kv_bytes > 0
    assert 0 <= done.queue_s <= done.ttft_s


def test_a_chat_goes_through_the_models_template(serving):
    with serving.client() as client:
        chat = text_of(client, [Message("user", "Hi")], max_tokens=2, ignore_eos=True)
        plain = text_of(client, "Hi", max_tokens=2, ignore_eos=True)
    assert chat.prompt_tokens > plain.prompt_tokens


def test_a_seed_repeats_and_another_differs(serving):
    with serving.client() as client:
        texts = [
            text_of(client, max_tokens=20, ignore_eos=True, sampling=Sampling(10.0, 0.95, seed)).text
            for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "input"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 2100}, "prompt"),
        ({"prompt": "x", "max_tokens": 9000}, "max_tokens"),
        ({"prompt": "x", "sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"prompt": "x", "sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"prompt": "x", "stop": [""]}, "stop[0]"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
        ({"chat": {}}, "chat.messages"),
        ({"chat": {"messages": [{"role": "robot", "content": "x"}]}}, "chat.messages[0].role"),
    ],
)
def test_a_wrong_field_is_named(serving, request_, field):
    with grpc.insecure_channel(serving.target) as channel, pytest.raises(grpc.RpcError) as error:
        list(
            inference_pb2_grpc.InferenceServiceStub(channel).Generate(
                inference_pb2.GenerateRequest(**request_)
            )
        )
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith(f"{field}: ")


def test_a_prompt_beyond_the_memory_bound_is_refused_at_once_with_the_figures(short_dir, small):
    # So much is kept for others that the model's 2048 tokens of context do not fit into the rest.
    with running_agent(short_dir, "headroom_bytes = 5_083_000_000") as agent:
        push(agent, small)
        with agent.client() as client:
            plan = client.memory_plan()
            assert 256 <= plan.context_tokens < 1500
            with pytest.raises(RemoteError) as error:
                text_of(client, "x" * 1500)
            assert error.value.code == "RESOURCE_EXHAUSTED"
            assert error.value.needed_bytes > error.value.available_bytes == plan.kv_bytes
            assert runtime(client).kv_promised_bytes == 0
            assert text_of(client, max_tokens=50, ignore_eos=True).completion_tokens == 50


def test_without_an_engine_the_error_says_how_to_get_one(agent):
    with agent.client() as client, pytest.raises(RemoteError, match="push") as error:
        text_of(client)
    assert error.value.code == "FAILED_PRECONDITION"


def test_another_model_than_the_active_one_is_refused(serving):
    with serving.client() as client, pytest.raises(RemoteError, match="tiny") as error:
        text_of(client, model="gemma")
    assert error.value.code == "FAILED_PRECONDITION"


def test_a_client_that_goes_away_frees_its_memory(busy):
    with busy.client() as client:
        with client.generate("Hello", max_tokens=2000, ignore_eos=True) as answer:
            next(answer)
            wait_for(lambda: runtime(client).kv_promised_bytes > 0, "a running sequence")
        wait_for(lambda: runtime(client).kv_promised_bytes == 0, "free memory")


def test_a_deadline_ends_the_request_and_frees_its_memory(busy):
    with busy.client() as client:
        with pytest.raises(RemoteError) as error:
            text_of(client, max_tokens=2000, ignore_eos=True, timeout_s=0.2)
        assert error.value.code == "DEADLINE_EXCEEDED"
        wait_for(lambda: runtime(client).kv_promised_bytes == 0, "free memory")


def test_when_the_worker_dies_its_requests_end_and_the_engine_comes_back(busy):
    with busy.client() as client:
        answer = client.generate("Hello", max_tokens=2000, ignore_eos=True)
        next(answer)
        worker = busy.worker_pid()
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RemoteError, match="stopped") as error:
            list(answer)
        assert error.value.code == "UNAVAILABLE"
        assert error.value.retry_after_s > 0
        wait_for(
            lambda: (now := runtime(client)).worker_restarts_total and now.state == "serving", "a new worker"
        )
        assert busy.worker_pid() != worker
        assert text_of(client, max_tokens=3, ignore_eos=True).completion_tokens == 3
        assert runtime(client).worker_restarts_total == 1


def test_the_worker_volunteers_to_the_oom_killer(serving):
    with open(f"/proc/{serving.worker_pid()}/oom_score_adj") as file:  # noqa: PTH123
        assert file.read().strip() == "1000"


def test_an_agent_that_was_killed_serves_the_same_engine_again(serving):
    with serving.client() as client:
        active = client.info().active_engine
        before = text_of(client, max_tokens=8, ignore_eos=True).text
    worker = serving.worker_pid()
    serving.stop(signal.SIGKILL)
    wait_for(lambda: gone(worker), "the worker's end")
    serving.start()
    with serving.client() as client:
        wait_for(lambda: runtime(client).state == "serving", "the engine")
        assert client.info().active_engine == active
        assert text_of(client, max_tokens=8, ignore_eos=True).text == before


def test_sigterm_lets_running_requests_end(busy):
    seen = {}

    def ask():
        with busy.client() as client:
            seen["done"] = text_of(client, max_tokens=600, ignore_eos=True)

    thread = threading.Thread(target=ask)
    with busy.client() as client:
        thread.start()
        wait_for(lambda: runtime(client).running_sequences > 0, "a running request")
        worker = busy.worker_pid()
    assert busy.stop(signal.SIGTERM, 30) == 0
    thread.join(10)
    assert seen["done"].completion_tokens == 600
    assert gone(worker)
    assert not busy.socket.exists()


def test_the_socket_is_for_the_group_and_nobody_else(agent):
    assert stat.S_IMODE(agent.socket.stat().st_mode) == 0o660


def test_a_second_agent_on_the_same_socket_is_refused_and_the_first_goes_on(agent):
    command = [sys.executable, "-m", "edgellm_agent", "run", "--config", str(agent.root / "agent.toml")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 1
    assert "another agent answers" in second.stderr
    assert "Traceback" not in second.stderr
    with agent.client() as client:
        assert client.info().device == "jetson-test"


def health(channel, service):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def test_health_follows_the_engine(agent, tiny):
    with grpc.insecure_channel(agent.target) as channel:
        assert health(channel, "") == health_pb2.HealthCheckResponse.SERVING
        name = "edgellm.v1.InferenceService"
        assert health(channel, name) == health_pb2.HealthCheckResponse.NOT_SERVING
        push(agent, tiny)
        assert health(channel, name) == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(agent):
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(agent.target) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"edgellm.v1.InferenceService", "edgellm.v1.EngineService", "edgellm.v1.DeviceService"} <= names


def test_a_client_that_watches_telemetry_does_not_hold_up_the_stop(agent):
    with agent.client() as client:
        watching = client.watch_telemetry(0.1)
        next(watching)
        assert agent.stop(signal.SIGTERM, timeout_s=10) == 0
        assert len(list(watching)) < 20


def test_health_says_so_while_the_engine_restarts(busy):
    name = "edgellm.v1.InferenceService"
    with grpc.insecure_channel(busy.target) as channel:
        assert health(channel, name) == health_pb2.HealthCheckResponse.SERVING
        os.kill(busy.worker_pid(), signal.SIGKILL)
        wait_for(lambda: health(channel, name) == health_pb2.HealthCheckResponse.NOT_SERVING, "the outage")
        wait_for(lambda: health(channel, name) == health_pb2.HealthCheckResponse.SERVING, "the recovery")
