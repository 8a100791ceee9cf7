"""The calls that bring an engine here: what is missing, blob by blob, and that it is whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from edgellm.bundle.manifest import EngineManifest
from edgellm.v1 import engines_pb2, engines_pb2_grpc
from edgellm_agent.access.caller import current
from edgellm_agent.errors import InvalidError
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.origin import Origin
from edgellm_agent.services import status
from edgellm_agent.services.messages import engine_message
from edgellm_agent.store import Ingest
from edgellm_agent.threads import in_thread


class PushMethods(engines_pb2_grpc.EngineServiceServicer):
    """Prepare, WriteBlob, Commit."""

    _manager: EngineManager

    @status.unary
    async def Prepare(
        self,
        request: engines_pb2.PrepareRequest,
        context: status.Context,
    ) -> engines_pb2.PrepareResponse:
        manifest = EngineManifest.parse(request.manifest)
        config = manifest.parse_config(request.config)
        attestations = list(request.attestations)
        plan = self._manager.prepare(manifest, config, attestations)
        self._manager.begin_push(manifest, config, attestations)
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
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidError("header", "the first message of the stream must be the header")
        header = first.header
        blob = self._manager.expected_blob(header.digest, header.size_bytes)
        begin = partial(self._manager.store.ingest, blob, header.offset_bytes)
        ingest = await in_thread(begin, undo=Ingest.close)
        try:
            async for message in request_iterator:
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
        stored = self._manager.commit_push(request.digest, Origin("local", actor=current().name))
        return engines_pb2.CommitResponse(engine=engine_message(self._manager, stored))
