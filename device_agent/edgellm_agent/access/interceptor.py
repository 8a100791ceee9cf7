"""What stands before every method: who calls, may they, is it too much, and what is written down of it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from grpc_status import rpc_status

from edgellm_agent.access import rules
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.caller import Caller, begin
from edgellm_agent.access.callers import Callers
from edgellm_agent.access.limits import Limits, until_silent
from edgellm_agent.access.refusal import code_name, to_status
from edgellm_agent.access.rules import Rule
from edgellm_agent.errors import AgentError, DeniedError, UnauthenticatedError
from edgellm_agent.services.status import Context

# Of its four kinds: takes a request or an iterator of them, gives a response or an iterator of them.
_Method: TypeAlias = Callable[[Any, Context], Any]
_CODES: dict[object, str] = {code.value[0]: code.name for code in grpc.StatusCode} | {
    code: code.name for code in grpc.StatusCode
}


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through to its method, or ends it before a line of that has run."""

    def __init__(self, callers: Callers, limits: Limits, audit: AuditLog) -> None:
        self._callers = callers
        self._limits = limits
        self._audit = audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Called by gRPC for each call; there is no context yet, so the method is wrapped."""
        name = rules.short_name(handler_call_details.method)
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._missing(name))
        kind = f"{_kind(handler.request_streaming)}_{_kind(handler.response_streaming)}"
        guarded = self._guarded(name, getattr(handler, kind), uploads=handler.request_streaming)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return cast(
            "grpc.RpcMethodHandler[Any, Any]",
            make(guarded, handler.request_deserializer, handler.response_serializer),
        )

    def _guarded(self, name: str, method: _Method, *, uploads: bool) -> _Method:
        async def answer(request: Any, context: Context) -> Any:
            async with self._call(name, request, context) as caller:
                return await method(self._upload(caller, name, request) if uploads else request, context)

        async def stream(request: Any, context: Context) -> AsyncGenerator[Any, None]:
            async with self._call(name, request, context) as caller:
                given = self._upload(caller, name, request) if uploads else request
                async with aclosing(method(given, context)) as responses:
                    async for response in responses:
                        yield response

        # gRPC asks the same question; a method that writes its stream to the context gives none back.
        return stream if inspect.isasyncgenfunction(method) else answer

    def _missing(self, name: str) -> _Method:
        async def answer(_: Any, context: Context) -> None:
            async with self._admitted(name, context):
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not served here")

        # Whoever may not call it does not learn whether it is there.
        return answer

    def _upload(self, caller: Caller, name: str, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        given = messages if rules.RULES[name].endless else until_silent(messages)
        # Around the silence: what we hold up is not the client's.
        return self._limits.paced(caller.name, given)

    @contextlib.asynccontextmanager
    async def _call(self, name: str, request: Any, context: Context) -> AsyncGenerator[Caller, None]:
        """Around a method that answers: what it did is written down if the rule says so."""
        async with self._admitted(name, context) as (caller, rule):
            if not rule.audited:
                yield caller
                return
            subject, outcome = rule.subject(request), "UNKNOWN"
            try:
                yield caller
                outcome = _outcome(context)
            except grpc.aio.AbortError:
                outcome = _outcome(context)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                outcome = "CANCELLED"
                raise
            finally:
                await self._audit.note(caller, name, subject, outcome)

    @contextlib.asynccontextmanager
    async def _admitted(self, name: str, context: Context) -> AsyncGenerator[tuple[Caller, Rule], None]:
        """Around every method; ends the call here if it is refused."""
        with contextlib.ExitStack() as counted:
            try:
                caller, rule = self._check(name, context)
                counted.enter_context(self._limits.call(caller.name, endless=rule.endless))
            except AgentError as error:
                await context.abort_with_status(rpc_status.to_status(to_status(error)))
                raise
            begin(caller)
            yield caller, rule

    def _check(self, name: str, context: Context) -> tuple[Caller, Rule]:
        """Raises UnauthenticatedError or DeniedError, and writes down that it did."""
        caller = None
        try:
            caller = self._callers.recognise(context)
            return caller, rules.check(caller, name)
        except (DeniedError, UnauthenticatedError) as error:
            who = caller.name if caller is not None else getattr(error, "who", "") or context.peer()
            self._audit.note_refusal(who, str(caller.role) if caller else "", name, code_name(error))
            raise


def _kind(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _outcome(context: Context) -> str:
    """Name of the status that the call ends with."""
    return _CODES.get(context.code(), "OK")
