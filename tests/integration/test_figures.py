"""What clients saw and what engines did is counted over all engines and workers since the agent's start."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import time
from importlib import metadata

import pytest

from edgellm.profiles import load_profile
from edgellm.v1 import inference_pb2
from edgellm_agent.engine.supervisor import Serving
from edgellm_agent.errors import InvalidError, UnavailableError
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.lifecycle.rack import Policy
from edgellm_agent.memory import MemoryPolicy
from edgellm_agent.registry import Registry
from edgellm_agent.store import Store


@pytest.fixture
async def manager(tmp_path):
    memory = MemoryPolicy(
        profile=load_profile("orin-nano-8gb"),
        simulated=True,
        headroom_bytes=1 << 20,
        context_tokens=1024,
        max_sequences=4,
        prefill_tokens=64,
    )
    policy = Policy(
        memory=memory,
        runtimes={"onnxruntime": metadata.version("onnxruntime")},
        architecture={"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
        serving=Serving(threads=1, poll_s=0.05),
        drain_s=5,
    )
    manager = EngineManager(Store(tmp_path), Registry(tmp_path / "registry.db"), policy)
    yield manager
    await manager.close()


def install(manager, bundle):
    """What a push does; gives the digest."""
    (variant,) = bundle.variants
    manifest = bundle.manifest(variant.digest)
    manager.begin_push(manifest, bundle.config(manifest))
    for layer in manifest.layers:
        manager.store.put(bundle.blob_path(layer.digest).read_bytes())
    return manager.commit_push(variant.digest).digest


def submit(manager, tokens=8, **fields):
    request = inference_pb2.GenerateRequest(prompt="x", max_tokens=tokens, ignore_eos=True, **fields)
    return manager.engine_for("").submit(request)


async def read(stream):
    return [token async for delta in stream for token in delta.token_ids]


async def until(probe, what):
    deadline = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def test_totals_go_on_over_engines_and_stay_without_one(manager, tiny, other_tiny):
    assert manager.runtime().state == "none"
    assert manager.runtime().requests_total == 0
    generated = 0
    for bundle in (tiny, other_tiny):
        await manager.activate(install(manager, bundle))
        await read(submit(manager, tokens=20))
        # What the agent asks of a new engine before it becomes the active one, and ours.
        generated += len(bundle.variants[0].config.canary.token_ids) + 20
        await until(lambda: manager.runtime().generated_tokens_total == generated, "the count")  # noqa: B023
    record = manager.runtime()
    assert (record.requests_total, record.finished_requests_total, record.failed_requests_total) == (4, 4, 0)
    assert record.time_to_first_token.count == 4
    # Those that come together count, too: each token but an answer's first has its gap.
    assert record.inter_token_latency.count == record.generated_tokens_total - 4
    assert 0 < record.inter_token_latency.p50_s <= record.inter_token_latency.p99_s < 20


async def test_what_the_client_cancels_is_neither_finished_nor_failed(manager, small):
    await manager.activate(install(manager, small))
    before = manager.runtime()
    stream = submit(manager, tokens=1000)
    async for _ in stream:
        break
    await stream.aclose()
    await until(lambda: manager.running.runtime().running_sequences == 0, "the end")
    # An answer after it proves that the cancelled one's end has come as well.
    await read(submit(manager))
    record = manager.runtime()
    assert record.requests_total == before.requests_total + 2
    assert record.finished_requests_total == before.finished_requests_total + 1
    assert record.failed_requests_total == 0


async def test_what_is_refused_or_dies_with_the_worker_has_failed(manager, small):
    await manager.activate(install(manager, small))
    with pytest.raises(InvalidError):
        await read(submit(manager, min_tokens=9, tokens=8))
    assert manager.runtime().failed_requests_total == 1
    stream = submit(manager, tokens=1000)
    async for _ in stream:
        break
    os.kill(manager.running.worker_pid, signal.SIGKILL)
    with pytest.raises(UnavailableError):
        await read(stream)
    await until(lambda: manager.runtime().state == "serving", "the new worker")
    record = manager.runtime()
    assert (record.failed_requests_total, record.worker_restarts_total) == (2, 1)
    assert record.finished_requests_total == 1
