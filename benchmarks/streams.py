"""A client process that reads several answers at once and prints how fast they came, as JSON.

`python -m benchmarks.streams TARGET TOKENS`, with a JSON list of prompts, one for each stream, on stdin.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from edgellm.client import AsyncClient


@dataclass(frozen=True)
class StreamsResult:
    """What the client saw.

    The window is the time in which every stream was running: from the last first token to the first end.
    """

    prompt_tokens: list[int]
    completion_tokens: list[int]
    wall_s: float
    window_s: float
    window_tokens: int

    @property
    def window_rate(self) -> float:
        """Tokens per second while all streams ran."""
        return self.window_tokens / self.window_s

    @property
    def whole_rate(self) -> float:
        """Tokens per second from the first request to the last token, prompts included."""
        return sum(self.completion_tokens) / self.wall_s


def read_streams(target: str, prompts: Sequence[str], tokens: int) -> StreamsResult:
    """Runs the client in a process of its own; raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streams", target, str(tokens)],
        input=json.dumps(list(prompts)),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return StreamsResult(**json.loads(done.stdout))


@dataclass(frozen=True)
class _Stream:
    arrivals: list[tuple[float, int]]
    prompt_tokens: int
    completion_tokens: int


async def _stream(client: AsyncClient, prompt: str, tokens: int) -> _Stream:
    arrivals = []
    answer = client.generate(prompt, max_tokens=tokens, ignore_eos=True)
    async for chunk in answer:
        arrivals.append((time.perf_counter(), len(chunk.token_ids)))  # noqa: PERF401
    return _Stream(arrivals, answer.completion.prompt_tokens, answer.completion.completion_tokens)


async def _main(target: str, tokens: int) -> None:
    prompts: list[str] = json.load(sys.stdin)
    async with AsyncClient(target) as client:
        await client.info()
        began = time.perf_counter()
        streams = await asyncio.gather(*(_stream(client, prompt, tokens) for prompt in prompts))
        wall_s = time.perf_counter() - began
    start = max(stream.arrivals[0][0] for stream in streams)
    end = min(stream.arrivals[-1][0] for stream in streams)
    result = StreamsResult(
        prompt_tokens=[stream.prompt_tokens for stream in streams],
        completion_tokens=[stream.completion_tokens for stream in streams],
        wall_s=wall_s,
        window_s=end - start,
        window_tokens=sum(n for stream in streams for at, n in stream.arrivals if start < at <= end),
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
