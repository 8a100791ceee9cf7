"""A target that answers by a script, in the time of its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from edgellm.bench import Piece, Request, Usage
from edgellm.errors import EdgellmError


@dataclass
class ScriptedTarget:
    """First token after `ttft_s`, one more each `tpot_s`; `failure` says which requests, by number, fail."""

    ttft_s: float = 0.5
    tpot_s: float = 0.1
    failure: Callable[[int], EdgellmError | None] = lambda _number: None
    count_tokens: Callable[[Request], int | None] = lambda request: len(str(request.prompt).split())
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        number = len(self.requests)
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if (error := self.failure(number)) is not None:
                raise error
            await asyncio.sleep(self.ttft_s)
            yield Piece(1, "a")
            for _ in range(request.output_tokens - 1):
                await asyncio.sleep(self.tpot_s)
                yield Piece(1, "b")
            yield Piece(0, usage=Usage(self.count_tokens(request), request.output_tokens, 0.1, 0.4))
        finally:
            self.running -= 1
