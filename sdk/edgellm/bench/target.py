"""What the load generator needs of anything that answers: one method, and the values that cross it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from edgellm.client import Message


@dataclass(frozen=True)
class Request:
    """One question, as plain text or as a chat; the answer is to have exactly `output_tokens`."""

    prompt: str | tuple[Message, ...]
    output_tokens: int


@dataclass(frozen=True)
class Usage:
    """What the target itself says of a finished answer; None for what it does not say."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    queue_s: float | None = None
    ttft_s: float | None = None


@dataclass(frozen=True)
class Piece:
    """What arrived at one moment: so many tokens, and their text. The last one may bring the usage."""

    tokens: int
    text: str = ""
    usage: Usage | None = None


class Target(Protocol):
    """Something that answers, several requests at a time if it can."""

    def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer as it arrives; closing the generator stops it.

        Raises RemoteError, which is counted by its code, or DeviceUnreachableError, which ends the run.
        """
        ...


class IteratorTarget:
    """A runtime in this process, given as a function that blocks for each piece.

    It takes one request at a time, since such runtimes have one context; the others wait their turn. `close`
    it after use.
    """

    def __init__(self, generate: Callable[[Request], Iterator[Piece]]) -> None:
        self._generate = generate
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bench-target")

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer, each piece made in the target's own thread."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            pieces = self._generate(request)
            while (piece := await loop.run_in_executor(self._thread, next, pieces, None)) is not None:
                yield piece

    def close(self) -> None:
        """Ends the thread, once the piece in the making is done."""
        self._thread.shutdown()
