"""Errors to OpenAI's shape and HTTP status, in one place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from edgellm_agent import errors

log = logging.getLogger(__name__)

# (status, code); the first kind that fits.
_KINDS: tuple[tuple[type[Exception], int, str | None], ...] = (
    (errors.InvalidError, 400, None),
    (errors.TooLargeError, 400, "context_length_exceeded"),
    (errors.DeniedError, 403, "permission_denied"),
    (errors.NotFoundError, 404, "model_not_found"),
    (errors.BusyError, 429, "rate_limit_exceeded"),
    (errors.UnavailableError, 503, "engine_unavailable"),
    (errors.PreconditionError, 503, "no_engine"),
    (errors.CancelledError, 503, "cancelled"),
    (errors.DeadlineError, 504, "timeout"),
    (errors.EngineError, 500, "engine_failed"),
)


class ApiError(Exception):
    """What a request is answered with instead of a completion.

    Args:
        status: HTTP status; in a stream that has begun, only the body is left to tell.
        message: One sentence of what is wrong.
        param: The request's parameter that is wrong, as a path.
        code: A word for programs.
        retry_after_s: Seconds after which it may go.
        headers: More headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            # The header takes whole seconds, and 0 would be a busy loop.
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))

    @property
    def type(self) -> str:
        """OpenAI's coarse class of errors."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body(), self.status, self.headers)


def to_api_error(error: Exception, params: Mapping[str, str] | None = None) -> ApiError:
    """What the client is told.

    Args:
        error: What went wrong.
        params: Fields of our request → the parameters that set them.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    for kind, status, code in _KINDS:
        if isinstance(error, kind):
            retry_after_s = getattr(error, "retry_after_s", None)
            if isinstance(error, errors.InvalidError):
                param = to_param(error.field, params or {})
                message = str(error).removeprefix(f"{error.field}: ")
                return ApiError(status, f"{param}: {message}", param=param, code=code)
            return ApiError(status, str(error), code=code, retry_after_s=retry_after_s)
    log.error("unexpected error in a request", exc_info=error)
    return ApiError(500, "the agent failed; its log says more", code="internal_error")


def to_param(field: str, params: Mapping[str, str]) -> str:
    """The parameter's path for a field's path: the longest prefix that `params` knows is replaced."""
    known = [name for name in params if field == name or field.startswith((f"{name}.", f"{name}["))]
    if not known:
        return field.removeprefix("sampling.").removeprefix("chat.")
    longest = max(known, key=len)
    return params[longest] + field[len(longest) :]


async def _refuse(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return to_api_error(error).response()


async def _leave(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The client went away with its request half sent: nobody reads this."""
    return Response(status_code=400)


HANDLERS: dict[Any, Any] = {
    ApiError: _refuse,
    errors.AgentError: _refuse,
    # Starlette's own: no such path, no such method.
    HTTPException: _refuse,
    ClientDisconnect: _leave,
    Exception: _refuse,
}
