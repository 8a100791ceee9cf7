"""Both clients keep the contract with a real gRPC server, and turn its refusals into our errors."""

from __future__ import annotations

import asyncio
import functools
import inspect
from datetime import timezone

import pytest

from edgellm.bundle import Bundle, BundleWriter
from edgellm.client import AsyncClient, AsyncGeneration, Client, Generation, Message, Sampling
from edgellm.errors import BundleError, DeviceUnreachableError, RemoteError
from edgellm.memory import plan_memory
from edgellm.v1 import device_pb2, inference_pb2
from tests.support.tiny_bundle import WEIGHTS, make_files
from tests.support.twins import connected


@pytest.fixture(params=["sync", "async"])
def connect(request):
    return functools.partial(connected, request.param)


def weights_digest(bundle: Bundle) -> str:
    return next(
        layer.digest for layer in bundle.variants[0].manifest.layers if layer.title == "weights-00000.bin"
    )


def test_the_clients_are_twins():
    def surface(kind):
        return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}

    for sync_kind, async_kind in ((Client, AsyncClient), (Generation, AsyncGeneration)):
        sync, twin = surface(sync_kind), surface(async_kind)
        assert sync.keys() == twin.keys()
        for name, method in sync.items():
            if callable(method):
                ours, theirs = inspect.signature(method).parameters, inspect.signature(twin[name]).parameters
                assert [*ours.values()] == [*theirs.values()], name


async def test_info_says_what_the_device_is(connect, target):
    async with connect(target) as client:
        info = await client.info()
    assert (info.device, info.profile, info.simulated) == ("fake-01", "orin-nano-8gb", True)
    assert info.runtimes[0].name == "onnxruntime"
    assert info.memory_available_bytes == 5_200_000_000


async def test_a_memory_plan_is_for_the_given_config_or_the_active_engine(connect, target, config, device):
    async with connect(target) as client:
        plan = await client.memory_plan(config)
        with pytest.raises(RemoteError, match="no engine is active") as error:
            await client.memory_plan()
    assert plan == plan_memory(config, available_bytes=device.available_bytes, headroom_bytes=1 << 20)
    assert error.value.code == "FAILED_PRECONDITION"
    assert "engine list" in error.value.hint


async def test_a_push_brings_every_blob_and_a_second_one_sends_nothing(connect, target, bundle, device):
    digest = bundle.variants[0].digest
    seen = []
    async with connect(target) as client:
        first = await client.push(bundle, digest, seen.append)
        second = await client.push(bundle, digest)
    total = bundle.variants[0].manifest.size_bytes
    assert (first.digest, first.sent_bytes, first.skipped_bytes) == (digest, total, 0)
    assert (second.sent_bytes, second.skipped_bytes) == (0, total)
    assert device.blobs[weights_digest(bundle)] == WEIGHTS
    assert (seen[0].done_bytes, seen[-1].done_bytes, seen[-1].total_bytes) == (0, total, total)
    assert first.plan.weights_bytes == bundle.variants[0].config.footprint.weights_bytes


async def test_a_cut_push_goes_on_where_it_was_cut(connect, target, bundle, device):
    weights = weights_digest(bundle)
    device.cut_after_bytes[weights] = 1 << 20
    async with connect(target) as client:
        with pytest.raises(DeviceUnreachableError):
            await client.push(bundle, bundle.variants[0].digest, retry_for_s=0)
        have = len(device.partial[weights])
        device.link_down = False
        result = await client.push(bundle, bundle.variants[0].digest)
    assert 0 < have < len(WEIGHTS)
    assert (weights, have) in device.uploads
    assert result.skipped_bytes >= have
    assert result.sent_bytes + result.skipped_bytes == bundle.variants[0].manifest.size_bytes
    assert device.blobs[weights] == WEIGHTS


async def test_a_blob_that_arrived_damaged_is_sent_again(connect, target, bundle, device):
    weights = weights_digest(bundle)
    device.corrupt[weights] = 1
    async with connect(target) as client:
        result = await client.push(bundle, bundle.variants[0].digest)
    assert device.uploads.count((weights, 0)) == 2
    assert device.blobs[weights] == WEIGHTS
    assert result.sent_bytes == bundle.variants[0].manifest.size_bytes + len(WEIGHTS)


async def test_a_blob_that_stays_damaged_is_given_up(connect, target, bundle, device):
    weights = weights_digest(bundle)
    device.corrupt[weights] = 100
    async with connect(target) as client:
        with pytest.raises(RemoteError, match="does not match") as error:
            await client.push(bundle, bundle.variants[0].digest)
    assert error.value.code == "DATA_LOSS"
    assert "edgellm inspect" in error.value.hint
    assert device.uploads.count((weights, 0)) == 3


async def test_another_offset_than_the_device_has_is_asked_for_again(connect, target, bundle, device):
    weights = weights_digest(bundle)
    device.wrong_offset_once.add(weights)
    async with connect(target) as client:
        await client.push(bundle, bundle.variants[0].digest)
    assert device.blobs[weights] == WEIGHTS


async def test_an_update_sends_only_what_changed(connect, target, bundle, device, config, tmp_path):
    files = make_files(tmp_path / "new")
    (files / "model.onnx").write_bytes(b"better graph")
    with BundleWriter(tmp_path / "new.bundle") as writer:
        digest = writer.add(files, config)
    async with connect(target) as client:
        await client.push(bundle, bundle.variants[0].digest)
        result = await client.push(Bundle.open(tmp_path / "new.bundle"), digest)
    assert result.sent_bytes == len(b"better graph")


async def test_a_blob_that_shrank_on_disk_is_named_and_the_device_keeps_no_engine(
    connect, target, bundle, device
):
    path = bundle.blob_path(weights_digest(bundle))
    path.write_bytes(WEIGHTS[:100])
    async with connect(target) as client:
        with pytest.raises(BundleError, match=path.name):
            await client.push(bundle, bundle.variants[0].digest)
    assert weights_digest(bundle) not in device.blobs


async def test_an_engine_that_does_not_fit_is_refused_with_figures_before_a_byte_is_sent(
    connect, target, bundle, device
):
    device.available_bytes = 1 << 20
    async with connect(target) as client:
        with pytest.raises(RemoteError) as error:
            await client.push(bundle, bundle.variants[0].digest)
    assert error.value.code == "RESOURCE_EXHAUSTED"
    assert error.value.available_bytes == 1 << 20
    assert error.value.needed_bytes is not None
    assert error.value.needed_bytes > 1 << 20
    assert device.uploads == []


async def test_activation_tells_its_phases_and_what_was_granted(connect, target, bundle, device):
    digest = bundle.variants[0].digest
    phases = []
    async with connect(target) as client:
        await client.push(bundle, digest)
        plan = await client.activate(digest, phases.append)
        engines, models = await client.engines(), await client.models()
    assert [step.phase for step in phases] == ["loading", "committed"]
    assert plan.kv_bytes > 0
    assert [(item.digest, item.active) for item in engines] == [(digest, True)]
    assert [(item.name, item.active) for item in models] == [("tiny-int4", True)]


async def test_a_failed_activation_is_an_error(connect, target, bundle, device):
    device.activation_fails = True
    async with connect(target) as client:
        await client.push(bundle, bundle.variants[0].digest)
        with pytest.raises(RemoteError, match="canary"):
            await client.activate(bundle.variants[0].digest)
    assert device.active == ""


async def test_removing_an_engine_says_what_came_free(connect, target, bundle, device):
    digest = bundle.variants[0].digest
    async with connect(target) as client:
        await client.push(bundle, digest)
        assert await client.remove(digest) == bundle.variants[0].manifest.size_bytes
        with pytest.raises(RemoteError, match="no engine") as error:
            await client.remove(digest)
    assert error.value.code == "NOT_FOUND"


async def test_a_device_that_is_not_there_says_so_with_what_to_do(connect, tmp_path):
    async with connect(f"unix://{tmp_path}/nobody.sock") as client:
        with pytest.raises(DeviceUnreachableError, match="No such file") as error:
            await client.info()
    assert "edgellm-agent" in error.value.hint


async def test_a_deadline_that_passes_is_an_error(connect, target, device):
    device.stalls = True
    async with connect(target, timeout_s=0.2) as client:
        with pytest.raises(RemoteError) as error:
            await client.info()
    assert error.value.code == "DEADLINE_EXCEEDED"


def test_an_answer_comes_in_pieces_with_a_summary_at_the_end(target, device):
    with Client(target) as client, client.generate("Hi", stop=["x"], max_tokens=9, ignore_eos=True) as answer:
        first = next(answer)
        with pytest.raises(RemoteError, match="ended early"):
            _ = answer.completion
        texts = [first.text, *(chunk.text for chunk in answer)]
        assert next(answer, None) is None
    assert texts == ["Hello", " ", "Jetson", "."]
    assert first.token_ids == (0,)
    completion = answer.completion
    assert (completion.text, completion.finish_reason) == ("Hello Jetson.", "stop")
    assert (completion.prompt_tokens, completion.completion_tokens, completion.kv_bytes) == (3, 4, 4096)
    assert completion.decode_tokens_per_s == pytest.approx(10)
    assert (completion.cached_tokens, completion.recomputed_tokens) == (2, 5)
    assert (completion.draft_tokens, completion.accepted_draft_tokens) == (4, 1)
    (request,) = device.requests
    assert (request.prompt, list(request.stop), request.max_tokens, request.ignore_eos) == (
        "Hi",
        ["x"],
        9,
        True,
    )
    assert request.sampling == inference_pb2.Sampling()
    assert not request.HasField("top_logprobs")
    assert not request.HasField("constraint")
    assert first.logprobs == ()


async def test_an_answer_comes_in_pieces_to_the_async_client(target, device):
    messages = [Message("system", "Be brief."), Message("user", "Hi")]
    async with AsyncClient(target) as client:
        answer = client.generate(messages, sampling=Sampling(0.5, top_p=0.9, seed=7))
        texts = [chunk.text async for chunk in answer]
        again = await client.generate("Hi").read()
    assert texts == ["Hello", " ", "Jetson", "."]
    assert answer.completion.text == again.text == "Hello Jetson."
    request = device.requests[0]
    assert [(item.role, item.content) for item in request.chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]
    assert request.sampling.temperature == pytest.approx(0.5)
    assert request.sampling.top_p == pytest.approx(0.9)
    assert request.sampling.seed == 7


def test_a_wrong_field_is_named(target):
    with Client(target) as client, pytest.raises(RemoteError, match="empty") as error:
        client.generate("").read()
    assert (error.value.code, error.value.field, error.value.hint) == (
        "INVALID_ARGUMENT",
        "prompt",
        "correct prompt",
    )


async def test_a_busy_device_is_not_an_absent_one(target, device):
    device.busy_for_s = 1.5
    with Client(target) as client, pytest.raises(RemoteError, match="restarts") as error:
        client.generate("Hi").read()
    async with AsyncClient(target) as client:
        with pytest.raises(RemoteError, match="restarts") as async_error:
            await client.generate("Hi").read()
    for caught in (error.value, async_error.value):
        assert (caught.code, caught.retry_after_s, caught.hint) == ("UNAVAILABLE", 1.5, "try again in 1.5 s")


def test_leaving_an_answer_tells_the_device_to_stop(target, device):
    device.answer = ("word ",) * 1_000_000
    with Client(target) as client:
        with client.generate("Hi") as answer:
            next(answer)
        assert device.cancelled.wait(5)


async def test_telemetry_comes_until_nobody_listens(target, device):
    with Client(target) as client:
        records = client.watch_telemetry(0.1)
        assert [next(records).sequence, next(records).sequence] == [1, 2]
        records.close()
        assert device.cancelled.wait(5)
    device.cancelled.clear()
    async with AsyncClient(target) as client:
        watched = client.watch_telemetry(0.1)
        assert [(await anext(watched)).sequence, (await anext(watched)).sequence] == [1, 2]
        await watched.aclose()
        assert await asyncio.to_thread(device.cancelled.wait, 5)


async def test_the_log_is_read_and_followed_in_the_same_words(target, device):
    for text in ("one", "two"):
        device.log.append(device_pb2.LogLine(level="INFO", logger="edgellm_agent.store", text=text))
    with Client(target) as client:
        (line,) = client.watch_logs(1, level="ERROR")
        watched = client.watch_logs(2, follow=True)
        assert [next(watched).text for _ in range(2)] == ["one", "two"]
        watched.close()
    async with AsyncClient(target) as client:
        assert [item async for item in client.watch_logs(1, level="ERROR")] == [line]
    assert (line.text, line.logger, line.time.tzinfo) == ("two", "edgellm_agent.store", timezone.utc)
    assert [request.level for request in device.log_requests] == ["ERROR", "INFO", "ERROR"]
    assert device.cancelled.wait(20)


async def test_a_pin_says_which_engine_it_keeps(connect, target, device):
    device.active = "sha256:" + "a" * 64
    async with connect(target) as client:
        assert await client.pin() == device.active
        assert device.pinned
        await client.pin(False)
        assert not device.pinned


async def test_who_one_is_and_the_audit_log_come_in_the_same_words(target, device):
    for outcome in ("OK", "NOT_FOUND", "DENIED"):
        device.audit.append(device_pb2.AuditRecord(caller="uid 1", subject="x", outcome=outcome))
    device.audit_was_changed = True
    with Client(target) as client:
        told, records = client.whoami(), client.audit(2)
        first, second = next(records), next(records)
        with pytest.raises(RemoteError, match="was changed") as error:
            next(records)
    async with AsyncClient(target) as client:
        assert await client.whoami() == told
        waited = client.audit(2)
        assert [await anext(waited), await anext(waited)] == [first, second]
        with pytest.raises(RemoteError, match="was changed"):
            await anext(waited)
    assert (told.caller, told.role) == ("uid 1000", "operator")
    assert error.value.code == "DATA_LOSS"
    assert (first.outcome, second.outcome) == ("NOT_FOUND", "DENIED")
    assert (first.caller, first.time.tzinfo) == ("uid 1", timezone.utc)
