"""The first request of an engine: it must answer before it becomes the active one."""

from __future__ import annotations

import asyncio

from edgellm.v1 import inference_pb2
from edgellm_agent.engine.base import Engine
from edgellm_agent.errors import EngineError, UnavailableError

_CANARY_TOKENS = 4
_CANARY_S = 30.0


async def try_engine(engine: Engine, deadline_s: float = _CANARY_S) -> None:
    """A few tokens through the whole path; raises EngineError if they do not come."""
    request = inference_pb2.GenerateRequest(prompt="Hello", max_tokens=_CANARY_TOKENS, ignore_eos=True)
    stream = engine.submit(request, deadline_s)

    async def read() -> None:
        async for _ in stream:
            pass

    try:
        # The worker keeps the deadline too, unless it hangs.
        await asyncio.wait_for(read(), deadline_s)
    except asyncio.TimeoutError:
        raise EngineError(f"the engine did not answer its first request within {deadline_s:g} s") from None
    except UnavailableError as error:
        raise EngineError(f"the engine failed its first request: {error}") from None
    finally:
        await stream.aclose()
    if stream.finished is None or stream.finished.usage.completion_tokens != _CANARY_TOKENS:
        raise EngineError("the engine's first request gave no answer")
