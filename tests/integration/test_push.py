"""Pushing and activating engines on a real agent."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from edgellm.client import AsyncClient, RateLimit
from edgellm.errors import RemoteError
from edgellm.v1 import engines_pb2
from edgellm.v1.engines_pb2_grpc import EngineServiceStub
from tests.conftest import make_bundle, push
from tests.support.agents import Agent, running_agent, wait_for
from tests.support.small_disk import small_disk


def stored_files(agent):
    return sorted(
        str(p.relative_to(agent.state))
        for p in agent.state.rglob("*")
        if p.is_file() and p.suffix not in {".db", ".db-wal", ".db-shm", ".jsonl"}
    )


def refused(agent, bundle):
    (variant,) = bundle.variants
    before = stored_files(agent)
    with agent.client() as client, pytest.raises(RemoteError) as error:
        client.push(bundle, variant.digest)
    assert stored_files(agent) == before
    return error.value


def test_a_pushed_engine_is_listed_and_answers_after_activation(agent, tiny):
    digest = push(agent, tiny)
    with agent.client() as client:
        (engine,) = client.engines()
        assert (engine.digest, engine.name, engine.active) == (digest, "tiny", True)
        assert client.models()[0].active
        assert client.info().active_engine == digest
        with client.generate("Hello", max_tokens=5, ignore_eos=True) as answer:
            assert sum(len(chunk.token_ids) for chunk in answer) == 5


def test_what_the_device_has_is_not_sent_again(serving, tiny):
    (variant,) = tiny.variants
    with serving.client() as client:
        again = client.push(tiny, variant.digest)
    assert again.sent_bytes == 0


def test_a_second_engine_takes_over_and_the_first_can_be_removed(serving, tiny, other_tiny):
    (first,) = tiny.variants
    with serving.client() as client:
        with pytest.raises(RemoteError, match="is active"):
            client.remove("tiny")
        second = push(serving, other_tiny)
        assert client.info().active_engine == second
        assert client.remove("tiny") > 0
        assert [e.digest for e in client.engines()] == [second]
    assert first.digest.removeprefix("sha256:") not in " ".join(stored_files(serving))


def test_a_cut_push_goes_on_where_it_was_cut(agent, tiny):
    (variant,) = tiny.variants
    manifest = tiny.manifest(variant.digest)
    shard = max(manifest.layers, key=lambda layer: layer.size_bytes)
    half = shard.size_bytes // 2
    with grpc.insecure_channel(agent.target) as channel:
        stub = EngineServiceStub(channel)
        config = tiny.blob_path(manifest.config.digest).read_bytes()
        stub.Prepare(engines_pb2.PrepareRequest(manifest=manifest.to_json(), config=config))

        def until_the_link_drops():
            header = engines_pb2.BlobHeader(digest=shard.digest, size_bytes=shard.size_bytes)
            yield engines_pb2.WriteBlobRequest(header=header)
            yield engines_pb2.WriteBlobRequest(chunk=tiny.blob_path(shard.digest).read_bytes()[:half])
            partial = agent.state / "ingest" / shard.digest.removeprefix("sha256:")
            wait_for(lambda: partial.exists() and partial.stat().st_size == half, "the first half")
            raise ConnectionError("the link drops")

        with pytest.raises(grpc.RpcError):
            stub.WriteBlob(until_the_link_drops())
    with agent.client() as client:
        result = client.push(tiny, variant.digest)
    everything = sum(blob.size_bytes for blob in manifest.blobs())
    assert result.sent_bytes == everything - half - manifest.config.size_bytes


def test_a_link_that_drops_at_any_moment_does_not_lock_the_blob(agent, tiny):
    (variant,) = tiny.variants
    manifest = tiny.manifest(variant.digest)
    shard = max(manifest.layers, key=lambda layer: layer.size_bytes)
    header = engines_pb2.BlobHeader(digest=shard.digest, size_bytes=shard.size_bytes)
    config = tiny.blob_path(manifest.config.digest).read_bytes()
    for milliseconds in range(0, 30, 2):
        with grpc.insecure_channel(agent.target) as channel:
            stub = EngineServiceStub(channel)
            stub.Prepare(engines_pb2.PrepareRequest(manifest=manifest.to_json(), config=config))

            def until_the_link_drops(pause_s=milliseconds / 1000):
                yield engines_pb2.WriteBlobRequest(header=header)
                time.sleep(pause_s)
                raise ConnectionError("the link drops")

            with pytest.raises(grpc.RpcError):
                stub.WriteBlob(until_the_link_drops())
    with agent.client() as client:
        client.push(tiny, variant.digest)


def test_bytes_that_do_not_match_their_digest_are_refused_and_dropped(agent, tiny):
    (variant,) = tiny.variants
    manifest = tiny.manifest(variant.digest)
    layer = manifest.layers[0]
    data = bytearray(tiny.blob_path(layer.digest).read_bytes())
    data[len(data) // 2] ^= 1
    with grpc.insecure_channel(agent.target) as channel:
        stub = EngineServiceStub(channel)
        config = tiny.blob_path(manifest.config.digest).read_bytes()
        stub.Prepare(engines_pb2.PrepareRequest(manifest=manifest.to_json(), config=config))
        messages = [
            engines_pb2.WriteBlobRequest(
                header=engines_pb2.BlobHeader(digest=layer.digest, size_bytes=layer.size_bytes)
            ),
            engines_pb2.WriteBlobRequest(chunk=bytes(data)),
        ]
        with pytest.raises(grpc.RpcError) as error:
            stub.WriteBlob(iter(messages))
        assert error.value.code() == grpc.StatusCode.DATA_LOSS
        assert layer.digest.removeprefix("sha256:") not in " ".join(stored_files(agent))
        with pytest.raises(grpc.RpcError) as error:
            stub.Commit(engines_pb2.CommitRequest(digest=manifest.digest))
        assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_a_blob_that_no_push_asked_for_is_refused(agent):
    header = engines_pb2.BlobHeader(digest="sha256:" + "0" * 64, size_bytes=10)
    with grpc.insecure_channel(agent.target) as channel, pytest.raises(grpc.RpcError) as error:
        EngineServiceStub(channel).WriteBlob(iter([engines_pb2.WriteBlobRequest(header=header)]))
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_an_engine_for_another_runtime_is_refused_before_a_byte_is_copied(agent, tmp_path):
    error = refused(agent, make_bundle(tmp_path, runtime="tensorrt"))
    assert error.code == "FAILED_PRECONDITION"
    assert "tensorrt" in str(error)
    assert "onnxruntime" in str(error)


def test_an_engine_for_another_runtime_version_is_refused(agent, tmp_path):
    error = refused(agent, make_bundle(tmp_path, runtime_requires=">=99"))
    assert error.code == "FAILED_PRECONDITION"
    assert ">=99" in str(error)


@pytest.mark.parametrize(
    "target", [{"profile": "thor-t5000", "sm": "11.0"}, {"profile": "x", "architecture": "arm64"}]
)
def test_an_engine_for_another_target_is_refused(agent, tmp_path, target):
    if target.get("architecture") == "arm64" and os.uname().machine == "aarch64":
        pytest.skip("this machine is that target")
    assert refused(agent, make_bundle(tmp_path, target=target)).code == "FAILED_PRECONDITION"


def test_an_engine_that_is_too_large_for_the_device_is_refused_with_the_figures(agent, tmp_path):
    footprint = {"weights_bytes": 6 << 30, "workspace_base_bytes": 0, "workspace_bytes_per_token": 0}
    error = refused(agent, make_bundle(tmp_path, footprint=footprint))
    assert error.code == "RESOURCE_EXHAUSTED"
    assert error.needed_bytes > 6 << 30 > error.available_bytes > 0


def test_a_full_disk_refuses_the_push_before_the_first_byte(short_dir, tiny):
    with running_agent(short_dir, prefix=small_disk(short_dir / "state", "300k")) as agent:
        (variant,) = tiny.variants
        with agent.client() as client:
            with pytest.raises(RemoteError, match="free on the device's disk") as error:
                client.push(tiny, variant.digest)
            assert error.value.code == "RESOURCE_EXHAUSTED"
            assert error.value.needed_bytes > error.value.available_bytes
            assert client.engines() == []


def test_an_agent_on_a_read_only_disk_says_so_and_ends(short_dir):
    agent = Agent(short_dir, prefix=small_disk(short_dir / "state", "300k", ",ro"))
    with pytest.raises(AssertionError):
        agent.start()
    assert agent.process.wait(10) == 1
    assert "error: the engine store cannot be written: read-only file system" in agent.log
    assert "Traceback" not in agent.log


def prepare(agent, bundle):
    manifest = bundle.manifest(bundle.variants[0].digest)
    config = bundle.blob_path(manifest.config.digest).read_bytes()
    with grpc.insecure_channel(agent.target) as channel:
        request = engines_pb2.PrepareRequest(manifest=manifest.to_json(), config=config)
        return EngineServiceStub(channel).Prepare(request)


def test_the_space_of_all_that_is_missing_is_taken_before_the_first_byte(agent, tiny):
    missing = prepare(agent, tiny).missing
    assert len(missing) > 2
    for blob in missing:
        reserved = (agent.state / "ingest" / blob.digest.removeprefix("sha256:")).stat()
        assert reserved.st_size == 0
        assert reserved.st_blocks * 512 >= blob.size_bytes


def slowly(bundle, seconds):
    """A rate at which the bundle's engine takes so long."""
    return RateLimit(bundle.variants[0].manifest.size_bytes / seconds)


def some_bytes_came(agent):
    def came():
        # Not what the device itself is about to put: such files have a suffix.
        return [p for p in (agent.state / "ingest").glob("?" * 64) if p.stat().st_size > 0]

    return wait_for(came, "the first bytes")


def push_async(agent, bundle, rate):
    async def main():
        async with AsyncClient(agent.target) as client:
            return await client.push(bundle, bundle.variants[0].digest, rate=rate)

    return asyncio.run(main())


def push_sync(agent, bundle, rate):
    with agent.client() as client:
        return client.push(bundle, bundle.variants[0].digest, rate=rate)


@pytest.mark.parametrize("push_with", [push_sync, push_async])
def test_a_push_outlives_an_agent_that_is_killed_and_comes_back(agent, tiny, push_with):
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(push_with, agent, tiny, slowly(tiny, 2))
        some_bytes_came(agent)
        agent.stop(signal.SIGKILL)
        agent.start()
        result = pushing.result(60)
    assert result.digest == tiny.variants[0].digest
    with agent.client() as client:
        client.activate(result.digest)
        assert client.push(tiny, result.digest).sent_bytes == 0
    assert list((agent.state / "ingest").iterdir()) == []


def test_what_a_killed_client_has_sent_is_not_sent_again(agent, tiny):
    command = [sys.executable, "-c", "from edgellm.cli.main import main; main()"]
    options = ["--device", agent.target, "--max-rate", "100kB"]
    with subprocess.Popen([*command, "push", "engine", str(tiny.path), *options]) as client:
        have = some_bytes_came(agent)[0].stat().st_size
        client.kill()
    result = push_sync(agent, tiny, None)
    assert result.skipped_bytes >= have > 0
    # Less, if the device still took what was on its way when it was asked.
    assert result.sent_bytes + result.skipped_bytes <= tiny.variants[0].manifest.size_bytes


def test_pushes_of_one_engine_at_the_same_time_all_end_well_and_share_the_work(agent, tiny):
    size = tiny.variants[0].manifest.size_bytes
    with ThreadPoolExecutor(3) as pool:
        begin = threading.Barrier(3)

        def one(push_with):
            begin.wait(10)
            return push_with(agent, tiny, slowly(tiny, 0.5))

        results = list(pool.map(one, [push_sync, push_async, push_sync]))
    assert len({result.digest for result in results}) == 1
    with agent.client() as client:
        client.activate(results[0].digest)
    # Pieces that were on their way when another was found to be faster come on top.
    assert size <= sum(result.sent_bytes for result in results) < 3 * size


def test_an_engine_that_was_changed_on_disk_is_not_activated(agent, tiny):
    (variant,) = tiny.variants
    shard = max(tiny.manifest(variant.digest).layers, key=lambda layer: layer.size_bytes)
    with agent.client() as client:
        client.push(tiny, variant.digest)
        path = agent.state / "blobs" / "sha256" / shard.digest.removeprefix("sha256:")
        path.chmod(0o640)
        with path.open("r+b") as file:
            file.seek(shard.size_bytes // 2)
            file.write(b"\xff\x00\xff")
        with pytest.raises(RemoteError, match=shard.title) as error:
            client.activate(variant.digest)
        assert error.value.code == "DATA_LOSS"
        # A push brings the file again, and only that.
        assert client.push(tiny, variant.digest).sent_bytes == shard.size_bytes
        client.activate(variant.digest)


def test_an_engine_that_does_not_load_leaves_the_old_one_serving(serving, tmp_path, tiny):
    broken = make_bundle(
        tmp_path, name="broken", files={"graph": "tokenizer.json", "tokenizer": "tokenizer.json"}
    )
    (variant,) = broken.variants
    (old,) = tiny.variants
    with serving.client() as client:
        client.push(broken, variant.digest)
        with pytest.raises(RemoteError, match="was refused") as error:
            client.activate(variant.digest)
        assert error.value.code == "INTERNAL"
        assert client.info().active_engine == old.digest
        with client.generate("Hello", max_tokens=3, ignore_eos=True) as answer:
            assert len(list(answer)) >= 1


def test_an_unknown_engine_is_not_found(agent):
    with agent.client() as client, pytest.raises(RemoteError, match="no engine 'nothing'") as error:
        client.activate("nothing")
    assert error.value.code == "NOT_FOUND"


def test_activating_the_engine_that_serves_keeps_its_worker(serving, tiny):
    worker = serving.worker_pid()
    push(serving, tiny)
    assert serving.worker_pid() == worker


def test_an_engine_whose_manifest_was_changed_on_disk_is_left_out_and_a_push_repairs_it(serving, other_tiny):
    (variant,) = other_tiny.variants
    with serving.client() as client:
        client.push(other_tiny, variant.digest)
        path = serving.state / "blobs" / "sha256" / variant.digest.removeprefix("sha256:")
        path.chmod(0o640)
        path.write_bytes(b"{}")
        assert [engine.name for engine in client.engines()] == ["tiny"]
        client.push(other_tiny, variant.digest)
        assert [engine.name for engine in client.engines()] == ["tiny", "other"]
