"""Sends an answer as it comes, or in one piece, to a client that may go away."""

from __future__ import annotations

import abc
import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent import errors
from edgellm_agent.engine.base import TokenStream
from edgellm_agent.http.answers import Format, Json, reason_of, usage_of
from edgellm_agent.http.errors import to_api_error

# What the worker gets to say itself that a deadline passed.
_SLACK_S = 5.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # A proxy that buffered would turn the stream into one late piece.
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class _Client:
    """The other end, as ASGI has it."""

    scope: Scope
    receive: Receive
    send: Send

    async def respond(self, response: JSONResponse) -> None:
        await response(self.scope, self.receive, self.send)


@dataclass
class Answer(abc.ABC):
    """One answer as an ASGI application."""

    stream: TokenStream
    """The engine's; it is cancelled when the client goes away."""
    format: Format
    params: Mapping[str, str]
    """Fields of the request → the client's parameters, for errors."""
    deadline_s: float
    """Longest that all of it may take."""
    logprobs: bool
    """Whether they were asked for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; the request's body must have been read."""
        client = _Client(scope, receive, send)
        watch = asyncio.create_task(self._cancel_when_gone(receive))
        try:
            await asyncio.wait_for(self._run(client), self.deadline_s + _SLACK_S)
        except asyncio.TimeoutError:
            await self._fail(errors.DeadlineError("the engine did not keep the deadline"), client)
        except asyncio.CancelledError:
            # Only the server's stop cancels a request; its client shall know that the text is not complete.
            await self._fail(errors.UnavailableError("the agent stops"), client)
        except Exception as error:  # noqa: BLE001
            await self._fail(error, client)
        finally:
            watch.cancel()
            await self.stream.aclose()

    @abc.abstractmethod
    async def _run(self, client: _Client) -> None:
        """Sends the answer; raises AgentError if there is none."""

    async def _fail(self, error: Exception, client: _Client) -> None:
        await client.respond(to_api_error(error, self.params).response())

    async def _cancel_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        # The stream then ends by itself, and its KV cache comes free with the next step.
        await self.stream.aclose()

    def _finished(self) -> worker_pb2.Finished:
        if self.stream.finished is None:
            raise errors.CancelledError("the request was cancelled")
        return self.stream.finished


@dataclass
class WholeAnswer(Answer):
    """The answer in one piece."""

    async def _run(self, client: _Client) -> None:
        texts: list[str] = []
        logprobs: list[inference_pb2.TokenLogprob] | None = [] if self.logprobs else None
        async for delta in self.stream:
            texts.append(delta.text)
            if logprobs is not None:
                logprobs.extend(delta.logprobs)
        finished = self._finished()
        choice = self.format.whole("".join(texts), logprobs, reason_of(finished))
        body = self.format.head.wrap(self.format.kind, [choice], usage=usage_of(finished))
        await client.respond(JSONResponse(body))


@dataclass
class StreamedAnswer(Answer):
    """The answer as server-sent events.

    The headers wait for the first token, so that what is refused before has a status of its own.
    """

    include_usage: bool = False
    _begun: bool = field(default=False, init=False)

    async def _run(self, client: _Client) -> None:
        async for delta in self.stream:
            await self._begin(client)
            logprobs = delta.logprobs if self.logprobs else None
            # Half a character, or what may yet become a stop string, has no text.
            if delta.text or logprobs:
                await self._send_choices(client, [self.format.delta(delta.text, logprobs, None)])
        finished = self._finished()
        await self._begin(client)
        await self._send_choices(client, [self.format.delta("", None, reason_of(finished))])
        if self.include_usage:
            await self._send_choices(client, [], usage=usage_of(finished))
        await self._end(client, b"data: [DONE]\n\n")

    async def _fail(self, error: Exception, client: _Client) -> None:
        if not self._begun:
            await super()._fail(error, client)
        else:
            await self._end(client, _event(to_api_error(error, self.params).body()))

    async def _begin(self, client: _Client) -> None:
        if self._begun:
            return
        self._begun = True
        await client.send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if opening := self.format.first():
            await self._send_choices(client, opening)

    async def _send_choices(self, client: _Client, choices: list[Json], usage: Json | None = None) -> None:
        # OpenAI: once usage is asked for, every chunk has the field.
        more = {"usage": usage} if self.include_usage else {}
        chunk = self.format.head.wrap(self.format.chunk_kind, choices, **more)
        await client.send({"type": "http.response.body", "body": _event(chunk), "more_body": True})

    async def _end(self, client: _Client, last: bytes) -> None:
        await client.send({"type": "http.response.body", "body": last, "more_body": False})


def _event(data: Json) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
