"""The HTTP server: uvicorn's HTTP/1.1 protocol, with a bound on all that a client may take.

What uvicorn leaves open: how long a request may take to arrive, how long a client may leave an answer unread,
and how many may connect.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from email.utils import formatdate
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from edgellm_agent.errors import PreconditionError
from edgellm_agent.http.errors import ApiError

log = logging.getLogger(__name__)

ARRIVAL_S = 30.0
READ_S = 30.0
_IDLE_S = 15
_MAX_HEADER_BYTES = 16 << 10
# What cancelled answers get to say so.
_LAST_WORDS_S = 1.0


class HttpServer:
    """Serves one ASGI application on one address."""

    def __init__(self, app: ASGIApp, listen: str, max_connections: int) -> None:
        self._listen = listen
        self._state = ServerState()
        config = Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            timeout_keep_alive=_IDLE_S,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
        self._protocol = functools.partial(BoundedProtocol, config, self._state, {}, max_connections)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens; raises PreconditionError when the port is taken."""
        host, _, port = self._listen.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            # Not uvicorn's own start: it ends the process when it cannot listen, and takes its signals.
            self._server = await loop.create_server(self._protocol, host.strip("[]"), int(port))
        except OSError as error:
            raise PreconditionError(
                f"cannot listen on {self._listen}: {error}; choose another `listen`, or stop who has it"
            ) from None
        log.info("listening on http://%s", self._listen)

    async def stop(self, grace_s: float) -> None:
        """Takes no new requests, gives the running ones so long, then tells them and ends."""
        if self._server is None:
            return
        self._server.close()
        for connection in self._open():
            connection.shutdown()
        await self._finished(grace_s)
        for task in list(self._state.tasks):
            task.cancel()
        await self._finished(_LAST_WORDS_S)
        for connection in self._open():
            connection.transport.abort()

    async def _finished(self, timeout_s: float) -> None:
        """Waits until all answers are sent and read, for so long at most."""
        waits = [*self._state.tasks, *(connection.lost for connection in self._open())]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)

    def _open(self) -> list[BoundedProtocol]:
        return [
            connection for connection in self._state.connections if isinstance(connection, BoundedProtocol)
        ]


class BoundedProtocol(H11Protocol):
    """One connection. Whoever is too slow is cut off; whoever is too many is told so."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        max_connections: int,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._max_connections = max_connections
        self.lost: asyncio.Future[None] = self.loop.create_future()
        self._arrival: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Counts the connection in."""
        super().connection_made(transport)
        # Any byte that the system does not take at once is one that the client has not read.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > 2 * self._max_connections:
            transport.abort()
            return
        if len(self.connections) > self._max_connections:
            self.app = _overloaded
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the timers."""
        _cancel(self._arrival)
        _cancel(self._unread)
        super().connection_lost(exc)
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        """The next request has its own time."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch_arrival()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read all."""
        _cancel(self._unread)
        super().resume_writing()

    def shutdown(self) -> None:
        """The server stops: what has not arrived by now is not taken any more."""
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an answer in the shape of all others."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The request whose body broke off is being answered already: its client is as good as gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        response = ApiError(400, msg, code="invalid_http").response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_arrival(self) -> None:
        """Keeps one timer from a request's first byte to its last."""
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not arriving:
            _cancel(self._arrival)
            self._arrival = None
        elif self._arrival is None:
            self._arrival = self.loop.call_later(ARRIVAL_S, self.transport.abort)


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        503,
        "too many connections to this agent",
        code="overloaded",
        retry_after_s=1,
        headers={"connection": "close"},
    )
    response: JSONResponse = error.response()
    await response(scope, receive, send)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
