"""The client whose calls block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.layout import Bundle
from edgellm.client import _generation as generation_
from edgellm.client import _model as model_
from edgellm.client._channel import Way, resolved
from edgellm.client._errors import translated
from edgellm.client._generation import Chunk, Completion
from edgellm.client._model import (
    ActivationStep,
    AuditRecord,
    CallerInfo,
    DeviceInfo,
    EngineInfo,
    HistoryEntry,
    LogLine,
    ModelInfo,
    PushResult,
)
from edgellm.client._patience import Patience
from edgellm.client._push import OnPushProgress, Push, Upload
from edgellm.client._rate import RateLimit
from edgellm.devices import Device
from edgellm.errors import DeviceUnreachableError, RemoteError
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


class Client:
    """Talks to one device, in blocking calls; close it, or use it as a context manager.

    Every method raises DeviceUnreachableError if nothing answers, and RemoteError if the device refuses or
    the deadline passes.

    Args:
        target: A `Device`, or its address: `unix:///run/edgellm/agent.sock`, `ssh://[user@]host`, or
            `host:port`, where both sides show a certificate. ssh is started by the first call, and again if
            its link was cut; TLS files are read now.
        timeout_s: Deadline of each call that has none of its own.
        client_id: Whose requests these are: the device shares its time fairly between clients. None means
            that this object is a client of its own.
        ssh_config: Configuration file for ssh; None means the user's own.
    """

    def __init__(
        self,
        target: str | Device,
        *,
        timeout_s: float = 30.0,
        client_id: str | None = None,
        ssh_config: Path | None = None,
    ) -> None:
        """Raises EdgellmError if the address is malformed or a TLS file cannot be used."""
        self._metadata = generation_.client_metadata(client_id)
        self._way = Way(target, ssh_config)
        self.target = self._way.target
        self.timeout_s = timeout_s
        self._device = DeviceServiceStub(self._way.channel)
        self._engines = EngineServiceStub(self._way.channel)
        self._inference = InferenceServiceStub(self._way.channel)

    @classmethod
    def for_device(
        cls, device: str | Device, *, timeout_s: float = 30.0, client_id: str | None = None
    ) -> Self:
        """A client for a device in `devices.toml`, or one from there; raises UnknownDeviceError."""
        return cls(resolved(device), timeout_s=timeout_s, client_id=client_id)

    def __enter__(self) -> Self:
        """Returns the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the client."""
        self.close()

    def close(self) -> None:
        """Ends the connection and what still runs on it."""
        self._way.close()

    def info(self) -> DeviceInfo:
        """What the device is and has."""
        return DeviceInfo.from_proto(self._call(self._device.GetInfo, device_pb2.GetInfoRequest()))

    def whoami(self) -> CallerInfo:
        """Who we are to the device, and in which role."""
        return CallerInfo.from_proto(self._call(self._device.WhoAmI, device_pb2.WhoAmIRequest()))

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

    def push(
        self,
        bundle: Bundle,
        digest: str,
        on_progress: OnPushProgress | None = None,
        *,
        streams: int = 4,
        rate: RateLimit | None = None,
        retry_for_s: float = 60.0,
    ) -> PushResult:
        """Brings an engine to the device: only what is missing there; a cut push goes on where it was cut.

        Args:
            bundle: Where the engine lies.
            digest: The engine: digest of its manifest.
            on_progress: Called now and then, from other threads.
            streams: Blobs on their way at once.
            rate: Bound on bytes per second, which pushes to other devices may share; None: no bound.
            retry_for_s: Once the push has begun, a link or an agent that is gone, or another push of the same
                blob, is waited for as long as the device gets no further for no longer than this; 0 waits for
                nothing.

        Raises BundleError if a blob cannot be read.
        """
        push = Push(bundle, digest, on_progress, rate=rate, retry_for_s=retry_for_s)
        uploads = push.prepared(self._call(self._engines.Prepare, push.prepare_request()))
        with ThreadPoolExecutor(streams, "edgellm-push") as pool:
            try:
                for sent in as_completed([pool.submit(self._bring, push, upload) for upload in uploads]):
                    sent.result()
            except BaseException:
                push.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        patience = push.patience()
        while not self._committed(push, patience):
            pass
        return push.result()

    def activate(
        self,
        engine: str,
        on_phase: Callable[[ActivationStep], None] | None = None,
        *,
        beside: bool = False,
        force: bool = False,
        until_committed: bool = False,
        timeout_s: float = 600.0,
    ) -> MemoryPlan:
        """Makes an engine (digest or unique name) the one that answers; returns what the device granted.

        Args:
            engine: Digest, or a name that only one has.
            on_phase: Called with each phase that is reached.
            beside: It answers requests that name it, beside the default engine, which stays.
            force: Though a program holds the engines.
            until_committed: Wait for the end of the engine's probation, too; allow time for it.
            timeout_s: Deadline of the whole. The activation goes on when it has passed.

        Raises RemoteError if the device stays with the engine that it had, or goes back to it.
        """
        request = engines_pb2.ActivateRequest(
            engine=engine, beside=beside, force=force, until_committed=until_committed
        )
        call = self._engines.Activate(request, timeout=timeout_s)
        return self._follow(call, on_phase)

    def roll_back(
        self,
        on_phase: Callable[[ActivationStep], None] | None = None,
        *,
        force: bool = False,
        until_committed: bool = False,
        timeout_s: float = 600.0,
    ) -> MemoryPlan:
        """Activates the engine that was committed before the present one; see `activate`."""
        call = self._engines.Rollback(
            engines_pb2.RollbackRequest(force=force, until_committed=until_committed), timeout=timeout_s
        )
        return self._follow(call, on_phase)

    def deactivate(self, engine: str, *, force: bool = False) -> None:
        """Takes an engine that answers beside the default one out of memory; it stays on the disk."""
        self._call(self._engines.Deactivate, engines_pb2.DeactivateRequest(engine=engine, force=force))

    def history(self, limit: int = 100) -> list[HistoryEntry]:
        """What happened to the engines of the device, the latest first."""
        response = self._call(self._engines.ListHistory, engines_pb2.ListHistoryRequest(limit=limit))
        return [HistoryEntry.from_proto(entry) for entry in response.entries]

    @contextmanager
    def hold(self, reason: str = "") -> Iterator[None]:
        """Within, no engine that runs is taken away; ends with this program at the latest.

        Raises RemoteError if the device does not grant it.
        """
        call = self._engines.HoldEngines(engines_pb2.HoldEnginesRequest(reason=reason))
        try:
            with translated(self.target):
                granted = next(iter(call), None)
            model_.check_hold(granted)
            yield
        finally:
            call.cancel()

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

    def audit(self, limit: int = 100) -> Iterator[AuditRecord]:
        """The last records of who changed what on the device, or was refused, oldest first; for admins.

        Raises RemoteError with the code DATA_LOSS, behind the last record, if any of the log was changed.
        """
        call = self._device.ReadAudit(device_pb2.ReadAuditRequest(limit=limit), timeout=self.timeout_s)
        try:
            with translated(self.target):
                for message in call:
                    yield AuditRecord.from_proto(message.record)
        finally:
            call.cancel()

    def _bring(self, push: Push, upload: Upload) -> None:
        """Sends a blob, again and again from where it was cut, until it is whole."""
        todo: Upload | None = upload
        while todo is not None:
            todo = self._attempt(push, todo)

    def _attempt(self, push: Push, upload: Upload) -> Upload | None:
        """What is still to be sent; None if that is nothing."""
        try:
            if upload.was_cut:
                return push.resumed(upload, self._call(self._engines.Prepare, push.prepare_request()))
            self._write_blob(push, upload)
        except (RemoteError, DeviceUnreachableError) as error:
            if not push.wait(upload.patience.pause_s(error)):
                raise
            upload.was_cut = True
            return upload
        return None

    def _write_blob(self, push: Push, upload: Upload) -> None:
        with upload:
            try:
                with translated(self.target):
                    call = self._engines.WriteBlob.future(
                        upload.messages(), timeout=upload.deadline_s(self.timeout_s)
                    )
                    push.begun(call)
                    call.result()
            finally:
                upload.check()

    def _follow(
        self,
        call: _ActivationCall,
        on_phase: Callable[[ActivationStep], None] | None,
    ) -> MemoryPlan:
        """Takes the phases of an activation."""
        step = None
        try:
            with translated(self.target):
                for message in call:
                    step = ActivationStep.from_proto(message)
                    if on_phase is not None:
                        on_phase(step)
        finally:
            call.cancel()
        return model_.granted(step)

    def _committed(self, push: Push, patience: Patience) -> bool:
        try:
            self._call(self._engines.Commit, push.commit_request())
        except (RemoteError, DeviceUnreachableError) as error:
            push.wait(patience.pause_s(error))
            return False
        return True

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with translated(self.target):
            return method(request, timeout=self.timeout_s)


class _ActivationCall(Protocol):
    def __iter__(self) -> Iterator[engines_pb2.ActivateResponse | engines_pb2.RollbackResponse]: ...
    def cancel(self) -> object: ...


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
