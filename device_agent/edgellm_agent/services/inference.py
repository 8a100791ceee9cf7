"""InferenceService: requests to the engine, its deltas to the stream."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator

from edgellm.v1 import inference_pb2, inference_pb2_grpc
from edgellm_agent.access.caller import current
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.services import status

_LONGEST_NAME = 64


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Text generation."""

    def __init__(self, manager: EngineManager) -> None:
        self._manager = manager

    @status.stream
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: status.Context
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        engine = self._manager.engine_for(request.model)
        request_id = uuid.uuid4().hex
        stream = engine.submit(request, context.time_remaining() or 0, _client(context))
        try:
            async for delta in stream:
                yield inference_pb2.GenerateResponse(
                    request_id=request_id,
                    token_ids=delta.token_ids,
                    text=delta.text,
                    logprobs=delta.logprobs,
                )
        finally:
            # A client that went away ends here too: its KV cache comes free with the next step.
            await stream.aclose()
        if stream.finished is not None:
            yield inference_pb2.GenerateResponse(
                request_id=request_id,
                finish_reason=stream.finished.reason,
                usage=stream.finished.usage,
                timings=stream.finished.timings,
            )

    @status.unary
    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,
        context: status.Context,
    ) -> inference_pb2.ListModelsResponse:
        active = self._manager.active_digest()
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=e.config.name,
                    digest=e.digest,
                    context_tokens=e.config.model.context_length,
                    precision=e.config.precision.weights,
                    runtime=e.config.runtime,
                    active=e.digest == active,
                )
                for e in self._manager.engines()
            ]
        )


def _client(context: status.Context) -> str:
    """Whose share of the time this takes: the caller's, divided between the names that its clients give."""
    given = ""
    for key, value in context.invocation_metadata() or ():
        if key == "edgellm-client":
            given = str(value)[:_LONGEST_NAME]
    return f"{current().name}/{given}"
