"""The client for asyncio: the same methods as `Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc.aio

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.layout import Bundle
from edgellm.client import _generation as generation_
from edgellm.client import _model as model_
from edgellm.client._channel import AsyncWay, resolved
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

    from edgellm.v1.device_pb2_grpc import DeviceServiceAsyncStub
    from edgellm.v1.engines_pb2_grpc import EngineServiceAsyncStub
    from edgellm.v1.inference_pb2_grpc import InferenceServiceAsyncStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """Talks to one device from a running event loop; close it, or use it as an async context manager.

    Every method raises DeviceUnreachableError if nothing answers, and RemoteError if the device refuses or
    the deadline passes. `Client` documents the arguments.

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
        self._way = AsyncWay(target, ssh_config)
        self.target = self._way.target
        self.timeout_s = timeout_s
        self._device = cast("DeviceServiceAsyncStub", DeviceServiceStub(self._way.channel))
        self._engines = cast("EngineServiceAsyncStub", EngineServiceStub(self._way.channel))
        self._inference = cast("InferenceServiceAsyncStub", InferenceServiceStub(self._way.channel))

    @classmethod
    def for_device(
        cls, device: str | Device, *, timeout_s: float = 30.0, client_id: str | None = None
    ) -> Self:
        """A client for a device in `devices.toml`, or one from there; raises UnknownDeviceError."""
        return cls(resolved(device), timeout_s=timeout_s, client_id=client_id)

    async def __aenter__(self) -> Self:
        """Returns the client itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the client."""
        await self.close()

    async def close(self) -> None:
        """Ends the connection and what still runs on it."""
        await self._way.close()

    async def info(self) -> DeviceInfo:
        """What the device is and has."""
        return DeviceInfo.from_proto(await self._call(self._device.GetInfo, device_pb2.GetInfoRequest()))

    async def whoami(self) -> CallerInfo:
        """Who we are to the device, and in which role."""
        return CallerInfo.from_proto(await self._call(self._device.WhoAmI, device_pb2.WhoAmIRequest()))

    async def memory_plan(self, config: EngineConfig | None = None) -> MemoryPlan:
        """How the active engine uses the device's memory, or how one with that config would."""
        request = device_pb2.GetMemoryPlanRequest(config=config.to_json() if config else b"")
        return MemoryPlan.from_proto((await self._call(self._device.GetMemoryPlan, request)).plan)

    async def models(self) -> list[ModelInfo]:
        """The models that the device can answer with."""
        response = await self._call(self._inference.ListModels, inference_pb2.ListModelsRequest())
        return [ModelInfo.from_proto(item) for item in response.models]

    async def engines(self) -> list[EngineInfo]:
        """The engines in the device's store."""
        response = await self._call(self._engines.ListEngines, engines_pb2.ListEnginesRequest())
        return [EngineInfo.from_proto(item) for item in response.engines]

    async def remove(self, engine: str) -> int:
        """Removes an engine, by digest or unique name; returns the disk space that came free, bytes."""
        request = engines_pb2.RemoveEngineRequest(engine=engine)
        return (await self._call(self._engines.RemoveEngine, request)).freed_bytes

    async def pin(self, pinned: bool = True) -> str:
        """Keeps the active engine, or gives the device back to its fleet; see `Client.pin`."""
        request = engines_pb2.PinEngineRequest(pinned=pinned)
        return (await self._call(self._engines.PinEngine, request)).active_engine

    async def push(
        self,
        bundle: Bundle,
        digest: str,
        on_progress: OnPushProgress | None = None,
        *,
        streams: int = 4,
        rate: RateLimit | None = None,
        retry_for_s: float = 60.0,
    ) -> PushResult:
        """Brings an engine to the device; see `Client.push`."""
        push = Push(bundle, digest, on_progress, rate=rate, retry_for_s=retry_for_s)
        slots = asyncio.Semaphore(streams)
        response = await self._call(self._engines.Prepare, push.prepare_request())
        tasks = [asyncio.create_task(self._bring(push, upload, slots)) for upload in push.prepared(response)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        patience = push.patience()
        while not await self._committed(push, patience):
            pass
        return push.result()

    async def activate(
        self,
        engine: str,
        on_phase: Callable[[ActivationStep], None] | None = None,
        *,
        beside: bool = False,
        force: bool = False,
        until_committed: bool = False,
        timeout_s: float = 600.0,
    ) -> MemoryPlan:
        """Makes an engine the one that answers; returns what the device granted; see `Client.activate`."""
        request = engines_pb2.ActivateRequest(
            engine=engine, beside=beside, force=force, until_committed=until_committed
        )
        call = self._engines.Activate(request, timeout=timeout_s)
        return await self._follow(call, on_phase)

    async def roll_back(
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
        return await self._follow(call, on_phase)

    async def deactivate(self, engine: str, *, force: bool = False) -> None:
        """Takes an engine that answers beside the default one out of memory; it stays on the disk."""
        await self._call(self._engines.Deactivate, engines_pb2.DeactivateRequest(engine=engine, force=force))

    async def history(self, limit: int = 100) -> list[HistoryEntry]:
        """What happened to the engines of the device, the latest first."""
        response = await self._call(self._engines.ListHistory, engines_pb2.ListHistoryRequest(limit=limit))
        return [HistoryEntry.from_proto(entry) for entry in response.entries]

    @asynccontextmanager
    async def hold(self, reason: str = "") -> AsyncIterator[None]:
        """Within, no engine that runs is taken away; ends with this program at the latest.

        Raises RemoteError if the device does not grant it.
        """
        call = self._engines.HoldEngines(engines_pb2.HoldEnginesRequest(reason=reason))
        try:
            with translated(self.target):
                granted = await anext(aiter(call), None)
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
    ) -> AsyncGeneration:
        """Starts an answer, to be read with `async for`; see `Client.generate`."""
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
        return AsyncGeneration(call, self.target)

    async def watch_telemetry(
        self, interval_s: float = 1.0, *, timeout_s: float | None = None
    ) -> AsyncIterator[Telemetry]:
        """One record now, then one per interval, until the iterator is closed or `timeout_s` has passed."""
        request = device_pb2.WatchTelemetryRequest(interval_s=interval_s)
        call = self._device.WatchTelemetry(request, timeout=timeout_s)
        try:
            with translated(self.target):
                async for message in call:
                    yield message.telemetry
        finally:
            call.cancel()

    async def watch_logs(
        self, lines: int = 0, *, follow: bool = False, level: str = "INFO", timeout_s: float | None = None
    ) -> AsyncIterator[LogLine]:
        """The last lines of the agent's log, and with `follow` each new one; see `Client.watch_logs`."""
        request = device_pb2.WatchLogsRequest(lines=lines, follow=follow, level=level)
        deadline_s = self.timeout_s if timeout_s is None and not follow else timeout_s
        call = self._device.WatchLogs(request, timeout=deadline_s)
        try:
            with translated(self.target):
                async for message in call:
                    yield LogLine.from_proto(message.line)
        finally:
            call.cancel()

    async def audit(self, limit: int = 100) -> AsyncIterator[AuditRecord]:
        """The last records of who changed what, or was refused; see `Client.audit`."""
        call = self._device.ReadAudit(device_pb2.ReadAuditRequest(limit=limit), timeout=self.timeout_s)
        try:
            with translated(self.target):
                async for message in call:
                    yield AuditRecord.from_proto(message.record)
        finally:
            call.cancel()

    async def _bring(self, push: Push, upload: Upload, slots: asyncio.Semaphore) -> None:
        """Sends a blob, again and again from where it was cut, until it is whole."""
        todo: Upload | None = upload
        async with slots:
            while todo is not None:
                todo = await self._attempt(push, todo)

    async def _attempt(self, push: Push, upload: Upload) -> Upload | None:
        """What is still to be sent; None if that is nothing."""
        try:
            if upload.was_cut:
                return push.resumed(upload, await self._call(self._engines.Prepare, push.prepare_request()))
            await self._write_blob(upload)
        except (RemoteError, DeviceUnreachableError) as error:
            await asyncio.sleep(upload.patience.pause_s(error))
            upload.was_cut = True
            return upload
        return None

    async def _write_blob(self, upload: Upload) -> None:
        with upload:
            try:
                with translated(self.target):
                    await self._engines.WriteBlob(
                        upload.messages_async(), timeout=upload.deadline_s(self.timeout_s)
                    )
            finally:
                upload.check()

    async def _follow(
        self,
        call: grpc.aio.UnaryStreamCall[Any, Any],
        on_phase: Callable[[ActivationStep], None] | None,
    ) -> MemoryPlan:
        """Takes the phases of an activation."""
        step = None
        try:
            with translated(self.target):
                async for message in call:
                    step = ActivationStep.from_proto(message)
                    if on_phase is not None:
                        on_phase(step)
        finally:
            call.cancel()
        return model_.granted(step)

    async def _committed(self, push: Push, patience: Patience) -> bool:
        try:
            await self._call(self._engines.Commit, push.commit_request())
        except (RemoteError, DeviceUnreachableError) as error:
            await asyncio.sleep(patience.pause_s(error))
            return False
        return True

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request
    ) -> _Response:
        with translated(self.target):
            return await method(request, timeout=self.timeout_s)


class AsyncGeneration(AsyncIterator[Chunk]):
    """An answer as it comes; `completion` is its summary once the iteration has ended."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
        target: str,
    ) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._target = target
        self._state = generation_.GenerationState()

    async def __anext__(self) -> Chunk:
        """The next piece; raises RemoteError or DeviceUnreachableError."""
        with translated(self._target):
            async for message in self._messages:
                chunk = self._state.take(message)
                if chunk is not None:
                    return chunk
        self._state.finished()
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        """Returns the answer itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancels what has not come yet."""
        self.cancel()

    def cancel(self) -> None:
        """Tells the device to stop; does nothing once the answer is whole."""
        self._call.cancel()

    @property
    def completion(self) -> Completion:
        """The summary; raises RemoteError before the end."""
        return self._state.finished()

    async def read(self) -> Completion:
        """Takes the rest of the answer and returns the summary, which has the whole text."""
        async for _ in self:
            pass
        return self.completion
