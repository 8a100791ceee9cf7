"""What strangers try: bundles that lead elsewhere, engines that misbehave, clients that hold on or flood."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import queue
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import onnx
import pytest

from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle import digest as digests
from edgellm.bundle import layout as layouts
from edgellm.bundle.manifest import INDEX_MEDIA_TYPE, canonical_json
from edgellm.client import Message
from edgellm.errors import BundleError, RemoteError
from edgellm.v1 import device_pb2, engines_pb2
from edgellm.v1.device_pb2_grpc import DeviceServiceStub
from edgellm.v1.engines_pb2_grpc import EngineServiceStub
from edgellm_agent.telemetry import recording
from edgellm_agent.telemetry.recording import RecordingError
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import QuantName
from tests.conftest import push
from tests.support.agents import Agent, running_agent, wait_for
from tests.support.http import connection, free_port, http_settings, read_to_end, request_bytes
from tests.support.tiny_bundle import make_config, make_files
from tests.support.tiny_models import make_tiny_hf

# Bundles on disk.


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    with BundleWriter(tmp_path / "tiny.bundle") as writer:
        writer.add(make_files(tmp_path / "files"), make_config())
    return Bundle.open(tmp_path / "tiny.bundle")


def test_a_blob_that_is_a_link_is_not_sent_even_if_its_content_is_right(made, tmp_path, agent):
    (variant,) = made.variants
    layer = variant.manifest.layers[-1]
    secret = tmp_path / "secret"
    made.blob_path(layer.digest).rename(secret)
    (made.path / layouts.BLOBS / digests.hex_of(layer.digest)).symlink_to(secret)
    with pytest.raises(BundleError, match="missing"):
        made.verify()
    with agent.client() as client, pytest.raises(BundleError, match="missing"):
        client.push(made, variant.digest)


@pytest.mark.parametrize("name", ["index.json", "oci-layout"])
@pytest.mark.parametrize("plant", ["link", "pipe", "folder"])
def test_a_bundle_whose_documents_are_no_plain_files_is_refused_at_once(made, tmp_path, name, plant):
    path = made.path / name
    path.rename(tmp_path / "moved")
    match plant:
        case "link":
            path.symlink_to(tmp_path / "moved")
        case "pipe":
            os.mkfifo(path)  # to open it would wait for a writer, for ever
        case "folder":
            path.mkdir()
    with pytest.raises(BundleError, match=name):
        Bundle.open(made.path)


def nested(bundle: Bundle, entries: list[dict[str, object]], times: int) -> dict[str, object]:
    """An index entry for an index that has these entries so many times."""
    data = canonical_json({"schemaVersion": 2, "mediaType": INDEX_MEDIA_TYPE, "manifests": entries * times})
    digest = digests.of_bytes(data)
    (bundle.path / layouts.BLOBS / digests.hex_of(digest)).write_bytes(data)
    return {"mediaType": INDEX_MEDIA_TYPE, "digest": digest, "size": len(data)}


def test_an_index_of_indexes_is_read_once_however_often_it_is_named(made, monkeypatch):
    reads = []
    read = layouts._read
    monkeypatch.setattr(layouts, "_read", lambda *args: reads.append(args) or read(*args))
    (outer,) = json.loads((made.path / "index.json").read_bytes())["manifests"]
    bomb = nested(made, [outer], 1000)
    (made.path / "index.json").write_bytes(canonical_json({"manifests": [bomb] * 1000}))
    assert Bundle.open(made.path).variants == made.variants
    assert len(reads) == 4


def test_an_index_of_more_manifests_than_boards_is_refused(made):
    many = []
    for number in range(1100):
        data = canonical_json({"number": number})
        (made.path / layouts.BLOBS / digests.hex_of(digests.of_bytes(data))).write_bytes(data)
        kind = "application/vnd.oci.image.manifest.v1+json"
        many.append({"mediaType": kind, "digest": digests.of_bytes(data), "size": len(data)})
    (made.path / "index.json").write_bytes(canonical_json({"manifests": many}))
    with pytest.raises(BundleError, match="more than 1024"):
        Bundle.open(made.path)


def test_a_recording_that_unzips_to_much_more_is_refused(tmp_path):
    header = recording.encoded(recording.Header(board="b", kernel="k", l4t="36", started="now"))
    line = recording.encoded(recording.Snapshot(t_s=0, files={"sys/a": "0" * 60_000}))
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as zipped:
        zipped.write(header + line)
        for second in range(1, 1300):
            zipped.write(line.replace(b'"t_s":0.0', b'"t_s":%d.0' % second))
    assert (tmp_path / "bomb.jsonl.gz").stat().st_size < 2 << 20
    with pytest.raises(RecordingError, match="in all"):
        recording.load(tmp_path / "bomb.jsonl.gz")


# Calls.


@pytest.fixture
def stub(agent: Agent) -> Iterator[EngineServiceStub]:
    with grpc.insecure_channel(agent.target) as channel:
        yield EngineServiceStub(channel)


def files_of(agent: Agent) -> set[str]:
    kept = {"registry", "trust", "audit"}
    return {str(p) for p in agent.root.rglob("*") if not any(name in str(p) for name in kept)}


def refused(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code()


@pytest.mark.parametrize(
    "title", ["../evil", "/etc/evil", "a/b", "..", ".", ".hidden", "x\0y", "x\n", "-rf", "é", "x" * 129]
)
def test_a_title_that_is_a_path_is_refused_and_nothing_is_written(agent, stub, made, title):
    (variant,) = made.variants
    document = json.loads(variant.manifest.raw)
    document["layers"][0]["annotations"]["org.opencontainers.image.title"] = title
    before = files_of(agent)
    request = engines_pb2.PrepareRequest(manifest=canonical_json(document), config=variant.config.to_json())
    assert refused(lambda: stub.Prepare(request)) is grpc.StatusCode.INVALID_ARGUMENT
    assert files_of(agent) == before


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "sha256:../../../../tmp/evil",
        "../../evil",
        "sha256:" + "A" * 64,
        "sha256:" + "0" * 63 + "/",
        "sha512:" + "0" * 64,
    ],
)
def test_a_digest_that_is_none_opens_no_file(agent, stub, digest):
    before = files_of(agent)
    header = engines_pb2.WriteBlobRequest(header={"digest": digest, "size_bytes": 4, "offset_bytes": 0})
    stream = [header, engines_pb2.WriteBlobRequest(chunk=b"evil")]
    assert refused(lambda: stub.WriteBlob(iter(stream))) in {
        grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND,
    }  # fmt: skip
    for method, kind in ((stub.Commit, engines_pb2.CommitRequest(digest=digest)),
                         (stub.RemoveEngine, engines_pb2.RemoveEngineRequest(engine=digest))):  # fmt: skip
        assert refused(lambda method=method, kind=kind: method(kind)) is not grpc.StatusCode.INTERNAL
    assert files_of(agent) == before


def test_more_bytes_than_were_announced_are_refused_and_not_kept(agent, stub, made):
    (variant,) = made.variants
    layer = variant.manifest.layers[0]
    stub.Prepare(engines_pb2.PrepareRequest(manifest=variant.manifest.raw, config=variant.config.to_json()))
    place = {"digest": layer.digest, "size_bytes": layer.size_bytes, "offset_bytes": 0}
    header = engines_pb2.WriteBlobRequest(header=place)
    flood = [header, *(engines_pb2.WriteBlobRequest(chunk=bytes(1 << 20)) for _ in range(20))]
    assert refused(lambda: stub.WriteBlob(iter(flood))) is grpc.StatusCode.INVALID_ARGUMENT
    kept = sum(path.stat().st_size for path in (agent.state / "ingest").iterdir())
    assert kept <= variant.manifest.size_bytes


def test_a_message_or_metadata_beyond_the_bounds_is_refused_before_it_is_read(agent, stub):
    large = engines_pb2.PrepareRequest(manifest=bytes(5 << 20))
    assert refused(lambda: stub.Prepare(large)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    flood = [(f"x-{i}", "y" * 1000) for i in range(100)]
    empty = engines_pb2.ListEnginesRequest()
    assert refused(lambda: stub.ListEngines(empty, metadata=flood)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not stub.ListEngines(empty).engines


def test_a_message_of_a_stream_that_is_none_is_the_client_s_fault(agent):
    with grpc.insecure_channel(agent.target) as channel:
        write = channel.stream_unary("/edgellm.v1.EngineService/WriteBlob")
        assert refused(lambda: write(iter([b"\xff\xff"]))) is grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in agent.log


@pytest.mark.parametrize("interval_s", [float("inf"), 1e300, float("nan"), -1.0])
def test_an_interval_that_nobody_could_wait_for_is_refused(agent, interval_s):
    with grpc.insecure_channel(agent.target) as channel:
        request = device_pb2.WatchTelemetryRequest(interval_s=interval_s)
        watch = DeviceServiceStub(channel).WatchTelemetry(request, timeout=10)
        assert refused(lambda: list(watch)) is grpc.StatusCode.INVALID_ARGUMENT


# Clients that hold on.


@contextlib.contextmanager
def silent_write(stub: EngineServiceStub, place: dict[str, object]) -> Iterator[grpc.Future]:
    """A stream of a blob that says what it will write and then nothing."""
    messages: queue.Queue[engines_pb2.WriteBlobRequest | None] = queue.Queue()
    messages.put(engines_pb2.WriteBlobRequest(header=place))
    call = stub.WriteBlob.future(iter(messages.get, None))
    try:
        yield call
    finally:
        call.cancel()
        messages.put(None)


def test_streams_that_fall_silent_keep_only_their_own_blob_from_others(agent, stub, tiny):
    (variant,) = tiny.variants
    stub.Prepare(engines_pb2.PrepareRequest(manifest=variant.manifest.raw, config=variant.config.to_json()))
    layer = variant.manifest.layers[0]
    place = {"digest": layer.digest, "size_bytes": layer.size_bytes, "offset_bytes": 0}
    with contextlib.ExitStack() as stack:
        calls = [stack.enter_context(silent_write(stub, place)) for _ in range(21)]
        # One of them has the blob, which may be any; it waits for its client.
        wait_for(lambda: sum(call.done() for call in calls) == 20, "20 refusals", timeout_s=60)
        assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.ABORTED}
        with agent.client() as client:
            assert client.info().device == "jetson-test"
    push(agent, tiny)


def test_connections_that_say_nothing_do_not_keep_others_out(short_dir, tiny):
    port = free_port()
    with (
        running_agent(short_dir, http_settings(port, max_connections=8)) as agent,
        contextlib.ExitStack() as stack,
    ):
        push(agent, tiny)
        for _ in range(100):
            mute = stack.enter_context(socket.socket(socket.AF_UNIX))
            mute.connect(str(agent.socket))
        crowd = [stack.enter_context(connection(port)) for _ in range(40)]
        for opened in crowd:
            with contextlib.suppress(OSError):
                opened.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
        with agent.client() as client, client.generate("Hi", max_tokens=2, ignore_eos=True) as answer:
            assert sum(len(chunk.token_ids) for chunk in answer) == 2


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"x-%d: y\r\n" % i for i in range(10_000)),
        b"x: " + b"y" * 100_000 + b"\r\n",
        b"content-length: 99999999999999999999\r\n",
        b"content-length: 1\r\ncontent-length: 2\r\n",
        b"transfer-encoding: gzip\r\n",
        b"content-encoding: gzip\r\ncontent-length: 0\r\n",
    ],
    ids=["many", "long", "huge body", "two lengths", "zipped transfer", "zipped body"],
)
def test_headers_that_flood_or_smuggle_are_refused(http_agent, head):
    with connection(http_agent) as opened:
        start = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with contextlib.suppress(OSError):
            opened.sendall(start + b"connection: close\r\n" + head + b"\r\n")
        answer = read_to_end(opened)
    assert answer == b"" or answer.split()[1] in {b"400", b"411", b"413", b"415", b"501"}
    with connection(http_agent) as opened:
        opened.sendall(request_bytes("/healthz", b"", method="GET", connection="close"))
        assert b"HTTP/1.1 " in read_to_end(opened)


@pytest.fixture(scope="module")
def http_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with running_agent(tmp_path_factory.mktemp("h"), http_settings(port)):
        yield port


# Engines that misbehave.


def engine_with(directory: Path, **edits: Callable[[bytes], bytes]) -> Bundle:
    """A tiny engine some of whose files were changed by who made the bundle: digests are right."""
    files = directory / "files"
    files.mkdir(parents=True)
    config = build_engine(
        open_checkpoint(make_tiny_hf(directory / "hf")),
        QuantName.INT8,
        files,
        profile="orin-nano-8gb",
        name="evil",
    )
    for field, edit in edits.items():
        for title in {
            getattr(config.files, field),
            config.files.graph_ragged if field == "graph" else None,
        } - {None}:
            (files / title).write_bytes(edit((files / title).read_bytes()))
    with BundleWriter(directory / "evil.bundle") as writer:
        writer.add(files, config)
    return Bundle.open(directory / "evil.bundle")


def pointing_elsewhere(graph: bytes) -> bytes:
    model = onnx.ModelProto.FromString(graph)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "/etc/passwd"
    return model.SerializeToString()


def stuck_tokenizer(document: bytes) -> bytes:
    parsed = json.loads(document)
    parsed["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    return json.dumps(parsed).encode()


@pytest.mark.parametrize(
    ("field", "edit", "words"),
    [
        ("graph", pointing_elsewhere, "/etc/passwd"),
        ("chat_template", lambda _: b"{{ 'a' * 10**10 }}{% if %}", "chat template"),
        ("chat_template", lambda _: b"{{ " + b"(" * 9000 + b")" * 9000 + b" }}", "nested"),
        ("tokenizer", stuck_tokenizer, "repeats a group"),
    ],
    ids=["graph", "template", "deep template", "tokenizer"],
)
def test_an_engine_that_reaches_out_or_hangs_is_not_activated_and_the_old_one_serves(
    serving, tmp_path, field, edit, words
):
    evil = engine_with(tmp_path, **{field: edit})
    with serving.client() as client:
        active = client.info().active_engine
        with pytest.raises(RemoteError, match=words):
            push(serving, evil)
        assert client.info().active_engine == active
        with client.generate("Hi", max_tokens=2, ignore_eos=True) as answer:
            assert sum(len(chunk.token_ids) for chunk in answer) == 2


def test_a_template_that_hangs_ends_its_chat_and_no_other_request(agent, tmp_path):
    hang = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    push(agent, engine_with(tmp_path, chat_template=lambda _: hang))
    worker = worker_of(agent)
    with agent.client() as client:
        with client.generate("Once", max_tokens=1500, ignore_eos=True) as running:
            next(iter(running))
            with (
                pytest.raises(RemoteError, match="chat template refused"),
                client.generate([Message("user", "Hi")], max_tokens=2) as chat,
            ):
                list(chat)
            assert sum(len(chunk.token_ids) for chunk in running) > 1400
        with client.generate("Hi", max_tokens=2, ignore_eos=True) as answer:
            assert sum(len(chunk.token_ids) for chunk in answer) == 2
    assert worker_of(agent) == worker


def worker_of(agent: Agent) -> str:
    """The worker's process id, from the agent's log."""
    return str(agent.worker_pid())
