"""Who may ask, and how much they may send, before anything is done for them."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from edgellm_agent.access import rules
from edgellm_agent.access.caller import Caller, Role, begin
from edgellm_agent.access.limits import Limits
from edgellm_agent.access.renewed import Renewed
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.errors import AgentError
from edgellm_agent.http.errors import ApiError, to_api_error
from edgellm_agent.http.settings import HttpSettings, is_loopback

# All who have the key are one: they may ask the engine, and nothing else is served here.
CALLER = Caller("http", Role.APP)
MAX_BODY_BYTES = 4 << 20
MAX_ARRIVING_BYTES = 16 << 20
# What asking takes, in the table of rules; all else below /v1 is about which models there are.
_GENERATES = {"/v1/chat/completions", "/v1/completions"}


class Guard:
    """Refuses what a web page in a browser on this machine could send, and what has not the key.

    A page whose name was pointed at this machine (DNS rebinding) still names its own host; a page's form or
    plain script can post to any host, but not as JSON.
    """

    def __init__(
        self, app: ASGIApp, api_key: Callable[[], str] | None, access: AccessSettings | None = None
    ) -> None:
        self._app = app
        self._api_key = api_key
        self._limits = Limits(access or AccessSettings())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        with contextlib.ExitStack() as counted:
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
                # Health and metrics stay open: probes and scrapers have no key, and are no callers.
                if scope["path"].startswith("/v1/"):
                    counted.enter_context(self._admitted(scope["path"]))
            except (ApiError, AgentError) as error:
                await to_api_error(error).response()(scope, receive, send)
                return
            begin(CALLER)
            await self._app(scope, receive, send)

    def _admitted(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Counts a call in, as for gRPC; raises DeniedError, and BusyError where it is entered."""
        rule = rules.check(CALLER, f"InferenceService/{'Generate' if path in _GENERATES else 'ListModels'}")
        return self._limits.call(CALLER.name, endless=rule.endless)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if not is_loopback(_host_name(headers.get("host", ""))):
            raise ApiError(403, "the Host header must name this machine: localhost or 127.0.0.1")
        if self._api_key is not None and path.startswith("/v1/"):
            self._check_key(headers.get("authorization", ""), self._api_key())
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and media_type != "application/json":
            raise ApiError(415, "the body must be of the type application/json")

    @staticmethod
    def _check_key(authorization: str, api_key: str) -> None:
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "give the agent's API key as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def open_key(settings: HttpSettings) -> Callable[[], str] | None:
    """Gives the key that is asked for now; None where none is. Raises ValueError for a file of no use."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value
    if settings.api_key_file is not None:
        return Renewed([settings.api_key_file], partial(_read_key, settings.api_key_file)).get
    return None


def _read_key(path: Path) -> str:
    try:
        key = path.read_text("utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"http api_key_file {path} cannot be read: {error}") from None
    if not key:
        raise ValueError(f"http api_key_file {path} is empty")
    if mode & 0o007:
        raise ValueError(
            f"http api_key_file {path} is open to all users: chmod 640, or 600, and write a new key"
        )
    return key


class Bodies:
    """Reads bodies, each and all together within bounds: they come before the engine can say it is busy."""

    def __init__(self, max_bytes: int = MAX_BODY_BYTES, max_arriving_bytes: int = MAX_ARRIVING_BYTES) -> None:
        self._max_bytes = max_bytes
        self._max_arriving_bytes = max_arriving_bytes
        self.arriving_bytes = 0

    async def read(self, request: Request) -> bytes:
        """The whole body; raises ApiError, or ClientDisconnect."""
        announced = request.headers.get("content-length", "0")
        self._check_size(int(announced))
        body = bytearray()
        try:
            async for chunk in request.stream():
                self._check_size(len(body) + len(chunk))
                self._check_room(len(chunk))
                body += chunk
                self.arriving_bytes += len(chunk)
        finally:
            self.arriving_bytes -= len(body)
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise ApiError(413, f"the body may have {self._max_bytes} bytes", code="request_too_large")

    def _check_room(self, size: int) -> None:
        if self.arriving_bytes + size > self._max_arriving_bytes:
            raise ApiError(503, "too many requests are arriving at once", code="overloaded", retry_after_s=1)


def _host_name(host: str) -> str:
    """A Host header without its port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
