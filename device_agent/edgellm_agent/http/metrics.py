"""Health and metrics: beside the API, or on a listener of their own for who scrapes from another machine."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgellm_agent.http.errors import HANDLERS
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.telemetry import prometheus
from edgellm_agent.telemetry.sampler import Sampler


class Metrics:
    """What can only be read: it names no prompt and changes nothing."""

    def __init__(self, manager: EngineManager, sampler: Sampler) -> None:
        self._manager = manager
        self._sampler = sampler

    def routes(self) -> list[Route]:
        """For an application that has more."""
        return [Route("/healthz", self._health), Route("/metrics", self._metrics)]

    def app(self) -> ASGIApp:
        """An application of nothing else.

        It has no guard against other Host headers: a scraper names the device, by whatever name it has there.
        """
        app = Starlette(routes=list(self.routes()), exception_handlers=HANDLERS)
        app.router.redirect_slashes = False
        return app

    async def _health(self, request: Request) -> Response:  # noqa: ARG002
        running = self._manager.running
        state = "none" if running is None else running.state
        return JSONResponse({"state": state}, 200 if state == "serving" else 503)

    async def _metrics(self, request: Request) -> Response:
        accept = request.headers.get("accept", "")
        body, media_type = prometheus.render(self._sampler.latest, accept, self._manager.totals)
        return Response(body, headers={"content-type": media_type})
