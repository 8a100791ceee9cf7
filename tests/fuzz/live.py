"""What a running agent listens for: every gRPC method, streams of blobs, HTTP."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from edgellm.bundle import Bundle
from edgellm.v1 import device_pb2, engines_pb2, inference_pb2, trust_pb2
from tests.conftest import make_bundle, push
from tests.fuzz.mutate import changed_bytes, changed_json, changed_message
from tests.fuzz.run import Target
from tests.support.agents import Agent, running_agent
from tests.support.http import free_port, http_settings, port_of, request_bytes

_FILES = (device_pb2, engines_pb2, inference_pb2, trust_pb2)
METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if not method.client_streaming
)
# What a client may be told. INTERNAL is a fault of ours, save for what gRPC says of what is no message.
_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
_WAIT_S = 10.0
# By the log's path: how much of it was looked at.
_seen: dict[Path, int] = {}
_live: dict[ExitStack, tuple[Agent, Bundle]] = {}


def _agent(stack: ExitStack, folder: Path) -> tuple[Agent, Bundle]:
    """One agent for all targets of a run, with an engine."""
    if stack not in _live:
        bundle = make_bundle(folder.parent / "live")
        root = folder.parent / "agent"
        root.mkdir()
        settings = http_settings(free_port())
        _live[stack] = (stack.enter_context(running_agent(root, settings)), bundle)
        stack.callback(_live.pop, stack)
        push(*_live[stack])
    return _live[stack]


def _check_alive(agent: Agent) -> None:
    """The agent runs, and has logged no error since the last look that it did not expect."""
    assert agent.process is not None
    assert agent.process.poll() is None, agent.log[-2000:]
    path = agent.root / "agent.log"
    with path.open("rb") as log:
        log.seek(_seen.get(path, 0))
        new = log.read()
    _seen[path] = _seen.get(path, 0) + len(new)
    text = new.decode(errors="replace")
    assert "unexpected error" not in text, text[text.index("unexpected error") :][:3000]


def _outcome(agent: Agent, error: grpc.RpcError) -> str:
    code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
    if code in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} and "DecodeError" in details:
        return "no message"
    _check_alive(agent)
    assert code in _CODES, f"{code}: {details}"
    return str(code.name)


def grpc_message(stack: ExitStack, folder: Path) -> Target:
    """The request of every method with one, the method's number first."""
    agent, bundle = _agent(stack, folder)
    channel = stack.enter_context(grpc.insecure_channel(agent.target))
    calls = [_call(channel, method) for method in METHODS]
    kinds = [message_factory.GetMessageClass(method.input_type) for method in METHODS]

    def run(data: bytes) -> str:
        call = calls[(data[0] if data else 0) % len(calls)]
        try:
            response = call(data[1:], timeout=_WAIT_S)
            if isinstance(response, Iterator):
                next(response, None)
                response.cancel()
        except grpc.RpcError as error:
            return _outcome(agent, error)
        return "answered"

    def mutate(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
        number = rng.randrange(len(METHODS))
        mine = [data[1:] for data in corpus if data[0] == number]
        return bytes([number]) + changed_message(kinds[number])(rng, mine)

    (variant,) = bundle.variants
    corpus = [bytes([i]) + kind().SerializeToString() for i, kind in enumerate(kinds)]
    examples: list[Message] = [
        engines_pb2.PrepareRequest(manifest=variant.manifest.raw, config=variant.config.to_json()),
        device_pb2.GetMemoryPlanRequest(config=variant.config.to_json()),
        inference_pb2.GenerateRequest(prompt="Hi", max_tokens=2),
    ]
    for example in examples:
        (number,) = (i for i, kind in enumerate(kinds) if kind.DESCRIPTOR is example.DESCRIPTOR)
        corpus.append(bytes([number]) + example.SerializeToString())
    return Target("grpc", corpus, run, mutate, folder)


def _call(channel: grpc.Channel, method: MethodDescriptor):  # type: ignore[no-untyped-def]
    path = f"/{method.containing_service.full_name}/{method.name}"
    return channel.unary_stream(path) if method.server_streaming else channel.unary_unary(path)


def write_blob(stack: ExitStack, folder: Path) -> Target:
    """Streams of a blob: a JSON list of headers and chunks, in any order, of any size and offset."""
    agent, bundle = _agent(stack, folder)
    channel = stack.enter_context(grpc.insecure_channel(agent.target))
    call = channel.stream_unary("/edgellm.v1.EngineService/WriteBlob")
    (variant,) = bundle.variants
    layer = variant.manifest.layers[0]
    ingests = agent.state / "ingest"

    def message(step: object) -> bytes:
        """One message; what makes none in protobuf's eyes is sent as bytes."""
        try:
            return engines_pb2.WriteBlobRequest(
                **({"header": step} if isinstance(step, dict) else {"chunk": bytes(int(step))})  # type: ignore[arg-type, call-overload]
            ).SerializeToString()
        except (ValueError, TypeError, OverflowError, AttributeError, MemoryError):
            return str(step).encode()[:10_000]

    def run(data: bytes) -> str:
        try:
            steps = json.loads(data)
        except (ValueError, RecursionError):
            steps = [data]
        if not isinstance(steps, list):
            steps = [steps]
        sent = [step if isinstance(step, bytes) else message(_bounded(step)) for step in steps[:30]]
        try:
            call(iter(sent), timeout=_WAIT_S)
        except grpc.RpcError as error:
            return _outcome(agent, error)
        finally:
            assert sum(1 for _ in ingests.iterdir()) < 20
        return "written"

    header = {"digest": layer.digest, "size_bytes": layer.size_bytes, "offset_bytes": 0}
    unknown = {"digest": "sha256:" + "0" * 64, "size_bytes": 3, "offset_bytes": 0}
    corpus = [
        json.dumps(steps).encode() for steps in ([header, 1000, 1000], [unknown, 3], [header], [1000, header])
    ]
    return Target("write-blob", corpus, run, changed_json, folder)


def _bounded(step: object) -> object:
    """Chunks above gRPC's own limit are its matter."""
    return min(abs(step), 1 << 20) if isinstance(step, int) and not isinstance(step, bool) else step


def http_bytes(stack: ExitStack, folder: Path) -> Target:
    """Raw bytes on the HTTP port."""
    agent, _ = _agent(stack, folder)
    body = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 2}).encode()
    corpus = [
        request_bytes("/v1/completions", body),
        request_bytes("/v1/models", b"", method="GET"),
        request_bytes("/v1/completions", b"5\r\n{}   \r\n0\r\n\r\n", transfer_encoding="chunked"),
        request_bytes("/metrics", b"", method="GET") + request_bytes("/healthz", b"", method="GET"),
    ]
    return Target("http-bytes", corpus, lambda data: _http(agent, data, ends=True), changed_bytes, folder)


def http_json(stack: ExitStack, folder: Path) -> Target:
    """Bodies of completions and chats."""
    agent, _ = _agent(stack, folder)
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "stream": True,
        "stop": ["x"],
        "temperature": 0.5,
        "logit_bias": {"7": 1},
        "response_format": {"type": "text"},
    }
    text = {"model": "tiny", "prompt": "Hi", "max_tokens": 2, "seed": 1, "logprobs": 2, "top_p": 0.9}

    def run(data: bytes) -> str:
        path = "/v1/chat/completions" if b"messages" in data else "/v1/completions"
        return _http(agent, request_bytes(path, data, connection="close"))

    return Target(
        "http-json", [json.dumps(body).encode() for body in (chat, text)], run, changed_json, folder
    )


def _http(agent: Agent, data: bytes, *, ends: bool = False) -> str:
    """The status of the last answer; the connection ends, and ends in time.

    Bytes that may be no whole request are followed by the client's end: the server waits 30 s for the rest.
    """
    with socket.create_connection(("127.0.0.1", port_of(agent)), timeout=_WAIT_S) as opened:
        received = b""
        try:
            opened.sendall(data)
            if ends:
                opened.shutdown(socket.SHUT_WR)
            while piece := opened.recv(65536):
                received = (received + piece)[-1_000_000:]
        except (ConnectionResetError, BrokenPipeError):
            pass
    _check_alive(agent)
    statuses = [line.split()[1] for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert not any(status.startswith(b"5") and status != b"503" for status in statuses), received[-2000:]
    return statuses[-1].decode() if statuses else "closed"
