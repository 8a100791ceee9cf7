"""EngineService: pushes into the store, activations through the manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from edgellm.bundle.manifest import EngineManifest
from edgellm.v1 import engines_pb2, engines_pb2_grpc
from edgellm_agent.errors import DeadlineError, InvalidError
from edgellm_agent.lifecycle import EngineManager, Phase, StoredEngine
from edgellm_agent.services import status
from edgellm_agent.store import Ingest
from edgellm_agent.threads import in_thread

Result = TypeVar("Result")

_SILENCE_S = 60.0


class EngineServicer(engines_pb2_grpc.EngineServiceServicer):
    """Push, activate, list, remove, pin."""

    def __init__(self, manager: EngineManager) -> None:
        self._manager = manager
        self._activations: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends activations that nobody waits for any more."""
        for task in self._activations:
            task.cancel()
        await asyncio.gather(*self._activations, return_exceptions=True)

    @status.unary
    async def Prepare(
        self,
        request: engines_pb2.PrepareRequest,
        context: status.Context,
    ) -> engines_pb2.PrepareResponse:
        manifest = EngineManifest.parse(request.manifest)
        config = manifest.parse_config(request.config)
        plan = self._manager.prepare(manifest, config)
        self._manager.begin_push(manifest, config)
        missing = [
            engines_pb2.MissingBlob(digest=b.digest, size_bytes=b.size_bytes, offset_bytes=offset)
            for b, offset in self._manager.store.missing(manifest.blobs())
        ]
        return engines_pb2.PrepareResponse(digest=manifest.digest, missing=missing, plan=plan.to_proto())

    @status.unary
    async def WriteBlob(
        self,
        request_iterator: AsyncIterator[engines_pb2.WriteBlobRequest],
        context: status.Context,
    ) -> engines_pb2.WriteBlobResponse:
        messages = _until_silent(request_iterator)
        first = await anext(messages, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidError("header", "the first message of the stream must be the header")
        header = first.header
        blob = self._manager.expected_blob(header.digest, header.size_bytes)
        begin = partial(self._manager.store.ingest, blob, header.offset_bytes)
        ingest = await in_thread(begin, undo=Ingest.close)
        try:
            async for message in messages:
                await in_thread(partial(ingest.write, message.chunk))
            await in_thread(ingest.commit)
        finally:
            ingest.close()
        return engines_pb2.WriteBlobResponse(size_bytes=ingest.offset_bytes)

    @status.unary
    async def Commit(
        self,
        request: engines_pb2.CommitRequest,
        context: status.Context,
    ) -> engines_pb2.CommitResponse:
        stored = self._manager.commit_push(request.digest)
        return engines_pb2.CommitResponse(engine=self._engine(stored))

    @status.stream
    async def Activate(
        self,
        request: engines_pb2.ActivateRequest,
        context: status.Context,
    ) -> AsyncGenerator[engines_pb2.ActivateResponse, None]:
        phases: asyncio.Queue[Phase | None] = asyncio.Queue()
        # A task of its own: an activation goes on when the link to the client drops.
        task = asyncio.create_task(self._manager.activate(request.engine, phases.put_nowait))
        self._activations.add(task)
        task.add_done_callback(self._activations.discard)
        task.add_done_callback(lambda _: phases.put_nowait(None))
        while (phase := await phases.get()) is not None:
            yield engines_pb2.ActivateResponse(
                phase=phase.phase,
                elapsed_s=phase.elapsed_s,
                plan=None if phase.plan is None else phase.plan.to_proto(),
            )
        await task

    @status.unary
    async def ListEngines(
        self,
        request: engines_pb2.ListEnginesRequest,
        context: status.Context,
    ) -> engines_pb2.ListEnginesResponse:
        return engines_pb2.ListEnginesResponse(engines=[self._engine(e) for e in self._manager.engines()])

    @status.unary
    async def RemoveEngine(
        self,
        request: engines_pb2.RemoveEngineRequest,
        context: status.Context,
    ) -> engines_pb2.RemoveEngineResponse:
        return engines_pb2.RemoveEngineResponse(freed_bytes=self._manager.remove(request.engine))

    @status.unary
    async def PinEngine(
        self,
        request: engines_pb2.PinEngineRequest,
        context: status.Context,
    ) -> engines_pb2.PinEngineResponse:
        self._manager.pin(request.pinned)
        return engines_pb2.PinEngineResponse(
            pinned=request.pinned, active_engine=self._manager.active_digest() or ""
        )

    def _engine(self, stored: StoredEngine) -> engines_pb2.Engine:
        added_at = Timestamp()
        added_at.FromNanoseconds(int(stored.added_at * 1e9))
        return engines_pb2.Engine(
            digest=stored.digest,
            name=stored.config.name,
            runtime=stored.config.runtime,
            precision=stored.config.precision.weights,
            size_bytes=stored.manifest.size_bytes,
            added_at=added_at,
            active=stored.digest == self._manager.active_digest(),
        )


async def _until_silent(
    messages: AsyncIterator[Result], silence_s: float = _SILENCE_S
) -> AsyncGenerator[Result, None]:
    """The messages; raises DeadlineError when none comes for so long.

    A dead link must not keep a blob locked.
    """
    iterator = aiter(messages)
    while True:
        try:
            yield await asyncio.wait_for(anext(iterator), silence_s)
        except StopAsyncIteration:  # noqa: PERF203 - each message has its own deadline
            return
        except asyncio.TimeoutError:
            raise DeadlineError(f"nothing came for {silence_s:g} s; what came before is kept") from None
