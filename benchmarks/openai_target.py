"""A server that speaks OpenAI's API over HTTP, as a target of the same load generator as a device."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx

from edgellm.bench import Piece, Request, Usage
from edgellm.errors import DeviceUnreachableError, RemoteError

if TYPE_CHECKING:
    from typing_extensions import Self

_PREFIX = "data:"
_END = "[DONE]"


class OpenAITarget:
    """Streams completions, or chat completions where the request is a chat; greedy, to the full length.

    An event with text counts as one token, which holds for servers that send each token as it comes; where
    the server sends its usage, that has the last word on how many there were.

    Args:
        base_url: For example "http://127.0.0.1:8000/v1".
        model: Name that the server wants in a request.
        extra: Fields that each request gets besides: what this server understands to go on past the end of
            sequence, for example `{"ignore_eos": True}` or `{"logit_bias": {"2": -100}}`.
        timeout_s: Longest silence of the server, seconds.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        extra: Mapping[str, object] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._base_url = base_url
        self._model = model
        self._extra = dict(extra or {})
        # A user each has a connection: none waits for another's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout_s, limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        """Returns the target itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer as it arrives; see `Target.generate`."""
        path, body = self._message(request)
        try:
            async with self._http.stream("POST", path, json=body) as response:
                await _check(response)
                async for event in _events(response):
                    yield _piece(event)
        except httpx.ConnectError as error:
            raise DeviceUnreachableError(
                f"cannot reach the server at {self._base_url}: {error}", "check that it runs there"
            ) from error
        except httpx.TimeoutException as error:
            raise RemoteError("the server was silent for too long", code="DEADLINE_EXCEEDED") from error
        except httpx.HTTPError as error:
            raise RemoteError(f"the connection broke: {error}", code="UNAVAILABLE") from error

    def _message(self, request: Request) -> tuple[str, dict[str, object]]:
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        if isinstance(request.prompt, str):
            return "completions", {**body, "prompt": request.prompt}
        messages = [{"role": message.role, "content": message.content} for message in request.prompt]
        return "chat/completions", {**body, "messages": messages}


async def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    text = (await response.aread()).decode("utf-8", "replace")
    # Named as gRPC names it where it is the same, so that both kinds of targets count alike.
    codes: dict[int, str] = {
        HTTPStatus.BAD_REQUEST: "INVALID_ARGUMENT",
        HTTPStatus.NOT_FOUND: "NOT_FOUND",
        HTTPStatus.TOO_MANY_REQUESTS: "RESOURCE_EXHAUSTED",
        HTTPStatus.SERVICE_UNAVAILABLE: "UNAVAILABLE",
    }
    code = codes.get(response.status_code, f"HTTP_{response.status_code}")
    wait = response.headers.get("retry-after", "")
    raise RemoteError(text[:500], code=code, retry_after_s=float(wait) if wait.isdigit() else None)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events up to the end; raises RemoteError if one of them is no JSON object."""
    async for line in response.aiter_lines():
        data = line.removeprefix(_PREFIX).strip() if line.startswith(_PREFIX) else ""
        if data == _END:
            return
        if data:
            yield _object(data)


def _object(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "error" in event:
        raise RemoteError(f"the server sent {data[:500]}", code="INTERNAL")
    return event


def _piece(event: Mapping[str, Any]) -> Piece:
    text = ""
    for choice in event.get("choices") or ():
        text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    counted = event.get("usage")
    usage = Usage(counted.get("prompt_tokens"), counted.get("completion_tokens")) if counted else None
    return Piece(1 if text else 0, text, usage)
