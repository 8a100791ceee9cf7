"""The first request of an engine: what it answers decides whether it may become an active one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

from edgellm.bundle.config import Canary, EngineConfig
from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent.engine.base import Engine
from edgellm_agent.errors import AgentError, BusyError, EngineError

log = logging.getLogger(__name__)

# For an engine that was built without a canary: any answer will do.
_PROMPT = "Hello"
_TOKENS = 4
_CANARY_S = 30.0
_HINT = "its files or the arithmetic of this device are wrong"
# A gap may move by so many tolerances: twice what was seen, since a good engine that is refused stays off a
# whole fleet. SmolLM2 with a layer of zeros or a head twice as loud keeps its tokens, and moves gaps by 2.9
# and more.
_GAP_TOLERANCES = 2.0


class Choice(NamedTuple):
    """A token that the engine chose, and its logit less the next largest one."""

    token: int
    gap: float


async def try_engine(engine: Engine, config: EngineConfig, deadline_s: float = _CANARY_S) -> None:
    """A few tokens through the whole path, which must be those that the engine gave where it was built.

    Raises EngineError if they do not come or are others; UnavailableError or BusyError if none can be asked.
    """
    canary = config.canary
    if canary is None:
        request = inference_pb2.GenerateRequest(prompt=_PROMPT, max_tokens=_TOKENS, ignore_eos=True)
        await _answer(engine, request, deadline_s)
        return
    request = inference_pb2.GenerateRequest(
        prompt=canary.prompt, max_tokens=len(canary.token_ids), ignore_eos=True, top_logprobs=2
    )
    deltas = await _answer(engine, request, deadline_s)
    compare(canary, [_choice(logprob) for delta in deltas for logprob in delta.logprobs])


def compare(canary: Canary, choices: Sequence[Choice]) -> None:
    """Raises EngineError if an answer leaves the canary's where it was clear, or was far less sure or surer.

    The first other token ends the comparison: after it the engine answers to another text.
    """
    for step, (expected, recorded, choice) in enumerate(
        zip(canary.token_ids, canary.gaps, choices, strict=True)
    ):
        if choice.token != expected:
            what = f"at step {step} of its canary the engine gave token {choice.token} and not {expected}"
            margin = f"the gap of {recorded:g} between the logits and the tolerance of {canary.tolerance:g}"
            if recorded >= canary.tolerance:
                raise EngineError(f"{what}, which {margin} do not allow; {_HINT}")
            log.info("%s, which %s allow", what, margin)
            return
        room = _GAP_TOLERANCES * canary.tolerance
        # Not: more than the room. A gap that is no number is no gap.
        if not abs(choice.gap - recorded) <= room:
            what = f"at step {step} of its canary the gap of token {expected} to the next is {choice.gap:.2f}"
            raise EngineError(f"{what}, more than {room:g} away from {recorded:g}; {_HINT}")


def _choice(logprob: inference_pb2.TokenLogprob) -> Choice:
    # Logarithms of probabilities differ as their logits do.
    first, second = logprob.top
    return Choice(logprob.token.id, first.logprob - second.logprob)


async def _answer(
    engine: Engine, request: inference_pb2.GenerateRequest, deadline_s: float
) -> list[worker_pb2.Delta]:
    """The whole answer; raises EngineError if it does not come or is too short."""
    stream = engine.submit(request, deadline_s)

    async def read() -> list[worker_pb2.Delta]:
        return [delta async for delta in stream]

    try:
        # The worker keeps the deadline too, unless it hangs.
        deltas = await asyncio.wait_for(read(), deadline_s)
    except asyncio.TimeoutError:
        raise EngineError(f"the engine did not answer its first request within {deadline_s:g} s") from None
    except BusyError:
        raise
    except AgentError as error:
        raise EngineError(f"the engine failed its first request: {error}") from None
    finally:
        await stream.aclose()
    count = sum(len(delta.token_ids) for delta in deltas)
    if count != request.max_tokens:
        raise EngineError(f"the engine's first request gave {count} of {request.max_tokens} tokens")
    return deltas
