"""The routes: OpenAI's completions and models, and health and metrics beside them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.engine.supervisor import SupervisedEngine
from edgellm_agent.errors import UnavailableError
from edgellm_agent.http.answers import ChatFormat, Format, Head, Json, TextFormat
from edgellm_agent.http.errors import HANDLERS, ApiError
from edgellm_agent.http.guard import Bodies, Guard, open_key
from edgellm_agent.http.metrics import Metrics
from edgellm_agent.http.schema import ChatRequest, Common, CompletionRequest, parse
from edgellm_agent.http.settings import HttpSettings
from edgellm_agent.http.streaming import Answer, StreamedAnswer, WholeAnswer
from edgellm_agent.http.translate import Translated, translate_chat, translate_completion
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.telemetry.sampler import Sampler


class Api:
    """What the routes do. It talks to the engines as the gRPC services do, through the manager."""

    def __init__(
        self,
        manager: EngineManager,
        sampler: Sampler,
        settings: HttpSettings,
        access: AccessSettings | None = None,
    ) -> None:
        self._manager = manager
        self._metrics = Metrics(manager, sampler)
        self._settings = settings
        self._access = access or AccessSettings()
        self._bodies = Bodies()

    def app(self) -> ASGIApp:
        """The ASGI application, guarded."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            *self._metrics.routes(),
        ]
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        app.router.redirect_slashes = False
        return Guard(app, open_key(self._settings), self._access)

    async def _chat(self, request: Request) -> Response | Answer:
        call = parse(ChatRequest, await self._bodies.read(request))
        engine = self._engine(call.model)
        head = Head.new("chatcmpl", engine.spec.config.name, engine.spec.digest)
        return self._answer(request, call, engine, translate_chat(call), ChatFormat(head))

    async def _complete(self, request: Request) -> Response | Answer:
        call = parse(CompletionRequest, await self._bodies.read(request))
        engine = self._engine(call.model)
        head = Head.new("cmpl", engine.spec.config.name, engine.spec.digest)
        return self._answer(request, call, engine, translate_completion(call), TextFormat(head))

    def _answer(
        self,
        request: Request,
        call: Common,
        engine: SupervisedEngine,
        translated: Translated,
        form: Format,
    ) -> Answer:
        client = f"http:{call.user or (request.client.host if request.client else '')}"
        deadline_s = self._settings.timeout_s
        stream = engine.submit(translated.request, deadline_s, client)
        logprobs = translated.request.HasField("top_logprobs")
        if not call.stream:
            return WholeAnswer(stream, form, translated.params, deadline_s, logprobs)
        include_usage = call.stream_options is not None and call.stream_options.include_usage
        return StreamedAnswer(stream, form, translated.params, deadline_s, logprobs, include_usage)

    def _engine(self, model: str) -> SupervisedEngine:
        """The engine for a request; the manager's one refusal is three different ones here."""
        engines = [loaded.engine for loaded in self._manager.rack.all]
        if not any(model in (engine.spec.config.name, engine.spec.digest) for engine in engines):
            if self._manager.running is None and self._manager.active_digest() is not None:
                raise UnavailableError(
                    "the active engine is not loaded yet; if that lasts, see the agent's log"
                )
            if model and engines:
                raise _no_model(model, engines)
        return self._manager.engine_for(model)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        models = [self._describe(loaded.engine) for loaded in self._manager.rack.all]
        return JSONResponse({"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._describe(self._engine(request.path_params["model"])))

    def _describe(self, engine: SupervisedEngine) -> Json:
        stored = self._manager.find(engine.spec.digest)
        return {
            "id": stored.config.name,
            "object": "model",
            "created": int(stored.added_at),
            "owned_by": "edgellm",
        }


def _no_model(model: str, engines: Sequence[SupervisedEngine]) -> ApiError:
    names = " and ".join(engine.spec.config.name for engine in engines)
    message = f"no engine {model} answers here, but {names}"
    return ApiError(404, message, param="model", code="model_not_found")
