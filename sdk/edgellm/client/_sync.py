"""The client whose calls block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.layout import Bundle
from edgellm.client import _generation as generation_
from edgellm.client import _model as model_
from edgellm.client._errors import translated
from edgellm.client._generation import Chunk, Completion
from edgellm.client._model import (
    ActivationStep,
    DeviceInfo,
    EngineInfo,
    LogLine,
    ModelInfo,
    PushResult,
)
from edgellm.client._push import OnPushProgress, Push, Upload
from edgellm.devices import DeviceBook
from edgellm.errors import RemoteError
from edgellm.memory import MemoryPlan
from edgellm.v1 import device_pb2, engines_pb2, inference_pb2
from edgellm.v1.device_pb2_grpc import DeviceServiceStub
from edgellm.v1.engines_pb2_grpc import EngineServiceStub
from edgellm.v1.inference_pb2_grpc import InferenceServiceStub
from edgellm.v1.telemetry_pb2 import Telemetry

if TYPE_CHECKING:
    from typing_extensions import Self

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

# A board is never behind the proxy that the environment names for the web.
CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


class Client:
    """Talks to one device, in blocking calls; close it, or use it as a context manager.

    Every method raises DeviceUnreachableError if nothing answers, and RemoteError if the device refuses or
    the deadline passes.

    Args:
        target: `unix:///run/edgellm/agent.sock` or `host:port`.
        timeout_s: Deadline of each call that has none of its own.
        client_id: Whose requests these are: the device shares its time fairly between clients. None means
            that this object is a client of its own.
    """

    def __init__(self, target: str, *, timeout_s: float = 30.0, client_id: str | None = None) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._metadata = generation_.client_metadata(client_id)
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._device = DeviceServiceStub(self._channel)
        self._engines = EngineServiceStub(self._channel)
        self._inference = InferenceServiceStub(self._channel)

    @classmethod
    def for_device(cls, name: str, *, timeout_s: float = 30.0, client_id: str | None = None) -> Self:
        """A client for a device in `devices.toml`; raises UnknownDeviceError."""
        return cls(DeviceBook().find(name).target, timeout_s=timeout_s, client_id=client_id)

    def __enter__(self) -> Self:
        """Returns the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the client."""
        self.close()

    def close(self) -> None:
        """Ends the connection and what still runs on it."""
        self._channel.close()

    def info(self) -> DeviceInfo:
        """What the device is and has."""
        return DeviceInfo.from_proto(self._call(self._device.GetInfo, device_pb2.GetInfoRequest()))

    def memory_plan(self, config: EngineConfig | None = None) -> MemoryPlan:
        """How the active engine uses the device's memory, or how one with that config would."""
        request = device_pb2.GetMemoryPlanRequest(config=config.to_json() if config else b"")
        return MemoryPlan.from_proto(self._call(self._device.GetMemoryPlan, request).plan)

    def models(self) -> list[ModelInfo]:
        """The models that the device can answer with."""
        response = self._call(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return [ModelInfo.from_proto(item) for item in response.models]

    def engines(self) -> list[EngineInfo]:
        """The engines in the device's store."""
        response = self._call(self._engines.ListEngines, engines_pb2.ListEnginesRequest())
        return [EngineInfo.from_proto(item) for item in response.engines]

    def remove(self, engine: str) -> int:
        """Removes an engine, by digest or unique name; returns the disk space that came free, bytes."""
        request = engines_pb2.RemoveEngineRequest(engine=engine)
        return self._call(self._engines.RemoveEngine, request).freed_bytes

    def pin(self, pinned: bool = True) -> str:
        """Keeps the active engine whatever the fleet desires, or (False) gives the device back to its fleet.

        Returns the active engine's digest; empty if there is none.
        """
        request = engines_pb2.PinEngineRequest(pinned=pinned)
        return self._call(self._engines.PinEngine, request).active_engine

    def push(self, bundle: Bundle, digest: str, on_progress: OnPushProgress | None = None) -> PushResult:
        """Brings an engine to the device: only what is missing there; a cut push goes on where it was cut.

        Args:
            bundle: Where the engine lies.
            digest: The engine: digest of its manifest.
            on_progress: Called now and then, from another thread.

        Raises BundleError if a blob cannot be read.
        """
        push = Push(bundle, digest, on_progress)
        for upload in push.prepared(self._call(self._engines.Prepare, push.prepare_request())):
            todo: Upload | None = upload
            while todo is not None:
                todo = self._attempt(push, todo)
        self._call(self._engines.Commit, engines_pb2.CommitRequest(digest=digest))
        return push.result()

    def activate(
        self,
        engine: str,
        on_phase: Callable[[ActivationStep], None] | None = None,
        *,
        timeout_s: float = 600.0,
    ) -> MemoryPlan:
        """Makes an engine (digest or unique name) the one that answers; returns what the device granted."""
        request = engines_pb2.ActivateRequest(engine=engine)
        step = None
        with translated(self.target):
            for message in self._engines.Activate(request, timeout=timeout_s):
                step = ActivationStep.from_proto(message)
                if on_phase is not None:
                    on_phase(step)
        return model_.granted(step)

    def generate(
        self,
        prompt: str | Sequence[generation_.Message],
        *,
        model: str = "",
        sampling: generation_.Sampling | None = None,
        max_tokens: int = 0,
        stop: Iterable[str] = (),
        ignore_eos: bool = False,
        min_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
        top_logprobs: int | None = None,
        constraint: generation_.Constraint | None = None,
        timeout_s: float = 600.0,
    ) -> Generation:
        """Starts an answer.

        Args:
            prompt: Text that is tokenized as it is, or the messages of a chat.
            model: Name or digest of the engine; empty means the active one.
            sampling: How tokens are chosen; None means greedy.
            max_tokens: Most tokens of the answer; 0 means 512, or what the context leaves.
            stop: Strings before which the answer ends.
            ignore_eos: Go on to max_tokens, for measuring.
            min_tokens: Neither the model's end nor a stop ends the answer before so many tokens.
            stop_token_ids: Tokens that end the answer as the model's own end does; at most 64.
            top_logprobs: Each token comes with its log probability and those of so many likeliest
                alternatives, at most 20; None means without.
            constraint: What the answer must look like.
            timeout_s: Deadline of the whole answer.
        """
        request = generation_.generate_request(
            prompt,
            model=model,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            top_logprobs=top_logprobs,
            constraint=constraint,
        )
        call = self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return Generation(call, self.target)

    def watch_telemetry(
        self, interval_s: float = 1.0, *, timeout_s: float | None = None
    ) -> Iterator[Telemetry]:
        """One record now, then one per interval, until the iterator is closed or `timeout_s` has passed."""
        request = device_pb2.WatchTelemetryRequest(interval_s=interval_s)
        call = self._device.WatchTelemetry(request, timeout=timeout_s)
        try:
            with translated(self.target):
                for message in call:
                    yield message.telemetry
        finally:
            call.cancel()

    def watch_logs(
        self, lines: int = 0, *, follow: bool = False, level: str = "INFO", timeout_s: float | None = None
    ) -> Iterator[LogLine]:
        """The last lines of the agent's log, its worker's included, as far as the agent keeps them.

        Args:
            lines: How many to begin with; 0 means 100.
            follow: Go on with each new line, until the iterator is closed or `timeout_s` has passed. A reader
                that is too slow misses lines, and a line tells it how many.
            level: Least level: "DEBUG", "INFO", "WARNING" or "ERROR".
            timeout_s: Deadline of the whole; None means `timeout_s` of the client, or none with `follow`.
        """
        request = device_pb2.WatchLogsRequest(lines=lines, follow=follow, level=level)
        deadline_s = self.timeout_s if timeout_s is None and not follow else timeout_s
        call = self._device.WatchLogs(request, timeout=deadline_s)
        try:
            with translated(self.target):
                for message in call:
                    yield LogLine.from_proto(message.line)
        finally:
            call.cancel()

    def _attempt(self, push: Push, upload: Upload) -> Upload | None:
        """What is to be tried again after an upload; None if it went well."""
        try:
            self._write_blob(upload)
        except RemoteError as error:
            time.sleep(push.retry(upload, error))
            return push.again(upload, self._call(self._engines.Prepare, push.prepare_request()))
        return None

    def _write_blob(self, upload: Upload) -> None:
        with upload:
            try:
                with translated(self.target):
                    self._engines.WriteBlob(upload.messages(), timeout=upload.deadline_s(self.timeout_s))
            finally:
                upload.check()

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with translated(self.target):
            return method(request, timeout=self.timeout_s)


class _AnswerCall(Protocol):
    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]: ...
    def cancel(self) -> object: ...


class Generation(Iterator[Chunk]):
    """An answer as it comes; `completion` is its summary once the iteration has ended."""

    def __init__(self, call: _AnswerCall, target: str) -> None:
        self._call = call
        self._target = target
        self._state = generation_.GenerationState()

    def __next__(self) -> Chunk:
        """The next piece; raises RemoteError or DeviceUnreachableError."""
        with translated(self._target):
            for message in self._call:
                chunk = self._state.take(message)
                if chunk is not None:
                    return chunk
        self._state.finished()
        raise StopIteration

    def __enter__(self) -> Self:
        """Returns the answer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Cancels what has not come yet."""
        self.cancel()

    def cancel(self) -> None:
        """Tells the device to stop; does nothing once the answer is whole."""
        self._call.cancel()

    @property
    def completion(self) -> Completion:
        """The summary; raises RemoteError before the end."""
        return self._state.finished()

    def read(self) -> Completion:
        """Takes the rest of the answer and returns the summary, which has the whole text."""
        for _ in self:
            pass
        return self.completion
