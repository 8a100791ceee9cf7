"""A device in memory behind a real gRPC server: keeps the contract, and fails when it is told to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
from google.protobuf import any_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from edgellm.bundle import EngineConfig, EngineManifest
from edgellm.bundle import digest as digests
from edgellm.errors import DoesNotFitError
from edgellm.memory import plan_memory
from edgellm.v1 import (
    device_pb2,
    device_pb2_grpc,
    engines_pb2,
    engines_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    telemetry_pb2,
)


@dataclass
class FakeDevice:
    """State of the device, and what is to go wrong."""

    profile: str = "orin-nano-8gb"
    available_bytes: int = 5_200_000_000
    answer: tuple[str, ...] = ("Hello", " ", "Jetson", ".")
    blobs: dict[str, bytes] = field(default_factory=dict)
    partial: dict[str, bytearray] = field(default_factory=dict)
    engines: dict[str, EngineManifest] = field(default_factory=dict)
    configs: dict[str, EngineConfig] = field(default_factory=dict)
    active: str = ""
    pinned: bool = False
    # Failures by digest: how often a blob is refused as corrupt, after how many bytes of it the link breaks.
    corrupt: dict[str, int] = field(default_factory=dict)
    cut_after_bytes: dict[str, int] = field(default_factory=dict)
    link_down: bool = False
    wrong_offset_once: set[str] = field(default_factory=set)
    busy_for_s: float | None = None
    activation_fails: bool = False
    stalls: bool = False
    # What is sent, over and over; without any, records that are empty but for their number.
    records: list[telemetry_pb2.Telemetry] = field(default_factory=list)
    log: list[device_pb2.LogLine] = field(default_factory=list)
    audit: list[device_pb2.AuditRecord] = field(default_factory=list)
    audit_was_changed: bool = False
    # Set once it is to send nothing more, as if its plug were pulled: connections live on.
    mute: threading.Event = field(default_factory=threading.Event)
    # What was seen.
    uploads: list[tuple[str, int]] = field(default_factory=list)
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    log_requests: list[device_pb2.WatchLogsRequest] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


def refuse(context: grpc.ServicerContext, code: int, text: str, *details: message.Message) -> NoReturn:
    """Ends a call with a google.rpc status."""
    status = status_pb2.Status(code=code, message=text)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("unreachable")


def fail_if_cut(device: FakeDevice, context: grpc.ServicerContext) -> None:
    """Ends a call as gRPC itself does when the link is down.

    The link stays down until the test mends it: grpc.aio may report the cut as INTERNAL, if it met it while
    it wrote, and the client then rightly tries again.
    """
    if device.link_down:
        context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")


class FakeDeviceService(device_pb2_grpc.DeviceServiceServicer):
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def GetInfo(self, request, context):
        if self.device.stalls:
            self.device.cancelled.wait(10)
        return device_pb2.GetInfoResponse(
            device="fake-01",
            agent_version="0.1.0",
            profile=self.device.profile,
            simulated=True,
            runtimes=[device_pb2.RuntimeInfo(name="onnxruntime", version="1.32.0")],
            memory_total_bytes=8 << 30,
            memory_available_bytes=self.device.available_bytes,
            disk_free_bytes=1 << 30,
            active_engine=self.device.active,
        )

    def GetMemoryPlan(self, request, context):
        if not request.config and not self.device.active:
            refuse(context, code_pb2.FAILED_PRECONDITION, "no engine is active")
        config = (
            EngineConfig.from_json(request.config)
            if request.config
            else self.device.configs[self.device.active]
        )
        return device_pb2.GetMemoryPlanResponse(plan=plan(self.device, config))

    def WhoAmI(self, request, context):
        return device_pb2.WhoAmIResponse(caller="uid 1000", role="operator")

    def ReadAudit(self, request, context):
        for record in self.device.audit[-request.limit :]:
            yield device_pb2.ReadAuditResponse(record=record)
        if self.device.audit_was_changed:
            refuse(context, code_pb2.DATA_LOSS, "line 3 of 1.jsonl was changed")

    def WatchTelemetry(self, request, context):
        gone = self.gone(context)
        for sequence in itertools.count(1):
            if self.device.mute.is_set():
                gone.wait(10)
            elif gone.wait(request.interval_s if sequence > 1 else 0):
                return
            record = telemetry_pb2.Telemetry(sequence=sequence)
            if self.device.records:
                record = self.device.records[(sequence - 1) % len(self.device.records)]
            yield device_pb2.WatchTelemetryResponse(telemetry=record)

    def WatchLogs(self, request, context):
        gone = self.gone(context)
        if request.lines > 2000:
            violation = error_details_pb2.BadRequest.FieldViolation(field="lines", description="too many")
            refuse(
                context,
                code_pb2.INVALID_ARGUMENT,
                "lines: at most 2000 are kept",
                error_details_pb2.BadRequest(field_violations=[violation]),
            )
        self.device.log_requests.append(request)
        sent = max(0, len(self.device.log) - request.lines)
        while not gone.is_set():
            for line in self.device.log[sent:]:
                yield device_pb2.WatchLogsResponse(line=line)
                sent += 1
            if not request.follow:
                return
            gone.wait(0.02)

    def gone(self, context: grpc.ServicerContext) -> threading.Event:
        """Is set when the client has gone away."""
        event = threading.Event()

        def went() -> None:
            event.set()
            self.device.cancelled.set()

        if not context.add_callback(went):
            went()
        return event


class FakeEngineService(engines_pb2_grpc.EngineServiceServicer):
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def Prepare(self, request, context):
        fail_if_cut(self.device, context)
        manifest = EngineManifest.parse(request.manifest)
        config = manifest.parse_config(request.config)
        if config.target.profile != self.device.profile:
            refuse(context, code_pb2.FAILED_PRECONDITION, f"this engine is for {config.target.profile}")
        try:
            granted = plan(self.device, config)
        except DoesNotFitError as error:
            figures = {"needed_bytes": str(error.needed_bytes), "available_bytes": str(error.available_bytes)}
            refuse(
                context,
                code_pb2.RESOURCE_EXHAUSTED,
                error.message,
                error_details_pb2.ErrorInfo(metadata=figures),
            )
        self.device.engines.setdefault(manifest.digest, manifest)
        self.device.configs[manifest.digest] = config
        missing = [
            engines_pb2.MissingBlob(
                digest=blob.digest,
                size_bytes=blob.size_bytes,
                offset_bytes=len(self.device.partial.get(blob.digest, b"")),
            )
            for blob in manifest.blobs()
            if blob.digest not in self.device.blobs
        ]
        return engines_pb2.PrepareResponse(digest=manifest.digest, missing=missing, plan=granted)

    def WriteBlob(self, request_iterator, context):
        header = next(request_iterator).header
        have = self.device.partial.setdefault(header.digest, bytearray())
        self.device.uploads.append((header.digest, header.offset_bytes))
        if header.digest in self.device.wrong_offset_once or header.offset_bytes != len(have):
            self.device.wrong_offset_once.discard(header.digest)
            refuse(context, code_pb2.ABORTED, f"the device has {len(have)} bytes")
        for part in request_iterator:
            assert len(part.chunk) <= 1 << 20
            have.extend(part.chunk)
            if len(have) > self.device.cut_after_bytes.get(header.digest, len(have)):
                del self.device.cut_after_bytes[header.digest]
                self.device.link_down = True
                fail_if_cut(self.device, context)
        if len(have) < header.size_bytes:
            refuse(context, code_pb2.ABORTED, "the stream ended early")
        del self.device.partial[header.digest]
        if self.device.corrupt.get(header.digest, 0) or digests.of_bytes(bytes(have)) != header.digest:
            self.device.corrupt[header.digest] = self.device.corrupt.get(header.digest, 1) - 1
            refuse(context, code_pb2.DATA_LOSS, f"{header.digest} does not match")
        self.device.blobs[header.digest] = bytes(have)
        return engines_pb2.WriteBlobResponse(size_bytes=len(have))

    def Commit(self, request, context):
        manifest = self.device.engines[request.digest]
        if any(blob.digest not in self.device.blobs for blob in manifest.blobs()):
            refuse(context, code_pb2.FAILED_PRECONDITION, "blobs are missing")
        return engines_pb2.CommitResponse(engine=self.engine(request.digest))

    def Activate(self, request, context):
        if request.engine not in self.device.engines:
            refuse(context, code_pb2.NOT_FOUND, f"no engine {request.engine}")
        yield engines_pb2.ActivateResponse(phase=engines_pb2.ACTIVATION_PHASE_LOADING, elapsed_s=0.1)
        if self.device.activation_fails:
            refuse(context, code_pb2.INTERNAL, "the canary failed")
        self.device.active = request.engine
        yield engines_pb2.ActivateResponse(
            phase=engines_pb2.ACTIVATION_PHASE_COMMITTED,
            elapsed_s=0.2,
            plan=plan(self.device, self.device.configs[request.engine]),
        )

    def ListEngines(self, request, context):
        return engines_pb2.ListEnginesResponse(
            engines=[self.engine(digest) for digest in self.device.engines]
        )

    def PinEngine(self, request, context):
        self.device.pinned = request.pinned
        return engines_pb2.PinEngineResponse(pinned=request.pinned, active_engine=self.device.active)

    def RemoveEngine(self, request, context):
        if request.engine not in self.device.engines:
            refuse(context, code_pb2.NOT_FOUND, f"no engine {request.engine}")
        return engines_pb2.RemoveEngineResponse(
            freed_bytes=self.device.engines.pop(request.engine).size_bytes
        )

    def engine(self, digest: str) -> engines_pb2.Engine:
        config = self.device.configs[digest]
        return engines_pb2.Engine(
            digest=digest,
            name=config.name,
            runtime=config.runtime,
            precision=config.precision.weights,
            size_bytes=self.device.engines[digest].size_bytes,
            active=digest == self.device.active,
        )


class FakeInferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def Generate(self, request, context):
        self.device.requests.append(request)
        self.device.clients.append(dict(context.invocation_metadata())["edgellm-client"])
        context.add_callback(self.device.cancelled.set)
        if self.device.busy_for_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.device.busy_for_s * 1000))
            refuse(context, code_pb2.UNAVAILABLE, "the engine restarts", retry)
        if not request.prompt and not request.chat.messages:
            violation = error_details_pb2.BadRequest.FieldViolation(field="prompt", description="is empty")
            refuse(
                context,
                code_pb2.INVALID_ARGUMENT,
                "the prompt is empty",
                error_details_pb2.BadRequest(field_violations=[violation]),
            )
        yield from self.stream(request)

    def stream(self, request: inference_pb2.GenerateRequest) -> Iterator[inference_pb2.GenerateResponse]:
        pieces = self.device.answer[: request.max_tokens or None]
        for number, text in enumerate(pieces):
            chances = logprobs(number, text, request.top_logprobs) if request.HasField("top_logprobs") else []
            yield inference_pb2.GenerateResponse(
                request_id="r1", token_ids=[number], text=text, logprobs=chances
            )
        yield inference_pb2.GenerateResponse(
            request_id="r1",
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(
                prompt_tokens=3,
                completion_tokens=len(pieces),
                kv_bytes=4096,
                cached_tokens=2,
                recomputed_tokens=5,
                draft_tokens=4,
                accepted_draft_tokens=1,
            ),
            timings=inference_pb2.Timings(queue_s=0.01, ttft_s=0.1, decode_s=0.3),
        )

    def ListModels(self, request, context):
        models = [
            inference_pb2.Model(
                name=config.name, digest=digest, context_tokens=2048, active=digest == self.device.active
            )
            for digest, config in self.device.configs.items()
        ]
        return inference_pb2.ListModelsResponse(models=models)


def logprobs(token: int, text: str, top: int) -> list[inference_pb2.TokenLogprob]:
    """The token with log probability -0.5, and `top` alternatives that are half a character each."""
    likely = inference_pb2.TokenChance(id=token, logprob=-0.5, text=text.encode())
    others = [
        inference_pb2.TokenChance(id=100 + place, logprob=-1.5 - place, text=b"\xc3") for place in range(top)
    ]
    return [inference_pb2.TokenLogprob(token=likely, top=others)]


def plan(device: FakeDevice, config: EngineConfig) -> device_pb2.MemoryPlan:
    return plan_memory(config, available_bytes=device.available_bytes, headroom_bytes=1 << 20).to_proto()


def serve(
    device: FakeDevice, address: str, credentials: grpc.ServerCredentials | None = None
) -> tuple[grpc.Server, int]:
    """Starts the server, which the caller stops; returns the port too, which is 1 for a Unix socket."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    device_pb2_grpc.add_DeviceServiceServicer_to_server(FakeDeviceService(device), server)
    engines_pb2_grpc.add_EngineServiceServicer_to_server(FakeEngineService(device), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeInferenceService(device), server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    return server, port
