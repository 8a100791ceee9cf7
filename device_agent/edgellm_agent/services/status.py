"""Errors to gRPC status, in one place."""

from __future__ import annotations

import functools
import logging
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from edgellm.errors import BundleError, DoesNotFitError
from edgellm_agent import errors

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]

_DOMAIN = "edgellm"

_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidError, code_pb2.INVALID_ARGUMENT),
    (BundleError, code_pb2.INVALID_ARGUMENT),
    (DecodeError, code_pb2.INVALID_ARGUMENT),
    (errors.TooLargeError, code_pb2.RESOURCE_EXHAUSTED),
    (DoesNotFitError, code_pb2.RESOURCE_EXHAUSTED),
    (errors.BusyError, code_pb2.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, code_pb2.UNAVAILABLE),
    (errors.PreconditionError, code_pb2.FAILED_PRECONDITION),
    (errors.DeniedError, code_pb2.PERMISSION_DENIED),
    (errors.UnauthenticatedError, code_pb2.UNAUTHENTICATED),
    (errors.NotFoundError, code_pb2.NOT_FOUND),
    (errors.DataLossError, code_pb2.DATA_LOSS),
    (errors.OffsetError, code_pb2.ABORTED),
    (errors.ConflictError, code_pb2.ABORTED),
    (errors.DeadlineError, code_pb2.DEADLINE_EXCEEDED),
    (errors.CancelledError, code_pb2.CANCELLED),
    (errors.EngineError, code_pb2.INTERNAL),
)


def unary(
    method: Callable[[Any, Request, Context], Awaitable[Response]],
) -> Callable[[Any, Request, Context], Awaitable[Response]]:
    """Makes a unary-response method end with the status of the error that it raises."""

    @functools.wraps(method)
    async def translated(servicer: Any, request: Request, context: Context) -> Response:
        try:
            return await method(servicer, request, context)
        except Exception as error:
            await _abort(context, error)
            raise AssertionError("abort returned") from error

    return translated


def stream(
    method: Callable[[Any, Request, Context], AsyncGenerator[Response, None]],
) -> Callable[[Any, Request, Context], AsyncGenerator[Response, None]]:
    """Makes a stream-response method end with the status of the error that it raises."""

    @functools.wraps(method)
    async def translated(servicer: Any, request: Request, context: Context) -> AsyncGenerator[Response, None]:
        try:
            # A client that goes away ends the method here and now, not when the garbage is collected.
            async with aclosing(method(servicer, request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001
            await _abort(context, error)

    return translated


def to_status(error: Exception) -> status_pb2.Status:
    """The status, with google.rpc details, that a client sees."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), code_pb2.INTERNAL)
    message = str(error)
    if code == code_pb2.INTERNAL and not isinstance(error, errors.AgentError):
        message = "the agent failed; its log says more"
    return status_pb2.Status(code=code, message=message, details=[_pack(d) for d in _details(error)])


def _details(error: Exception) -> list[Message]:
    match error:
        case errors.InvalidError():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case errors.TooLargeError() | DoesNotFitError():
            figures = {
                "needed_bytes": str(error.needed_bytes),
                "available_bytes": str(error.available_bytes),
            }
            return [error_details_pb2.ErrorInfo(reason="TOO_LARGE", domain=_DOMAIN, metadata=figures)]
        case errors.OffsetError():
            offset = {"offset_bytes": str(error.offset_bytes)}
            return [error_details_pb2.ErrorInfo(reason="OFFSET", domain=_DOMAIN, metadata=offset)]
        case errors.BusyError() | errors.ConflictError() | errors.UnavailableError():
            delay = Duration()
            delay.FromNanoseconds(int(error.retry_after_s * 1e9))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def _pack(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


async def _abort(context: Context, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, (errors.AgentError, BundleError, DoesNotFitError, sqlite3.Error, DecodeError)):
        log.error("unexpected error in a call", exc_info=error)
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
