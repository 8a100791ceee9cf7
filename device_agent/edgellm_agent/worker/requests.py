"""Checks a request and makes a sequence of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgellm.bundle.config import EngineConfig
from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent.worker.kv_pool import KvPool
from edgellm_agent.worker.sequence import SamplingParams, Sequence, Timeline
from edgellm_agent.worker.text import PromptError, TextModel

DEFAULT_MAX_TOKENS = 512
_MAX_STOPS = 16
_MAX_STOP_BYTES = 256
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Room:
    """What a sequence may grow to."""

    context_tokens: int
    pool: KvPool


def make_sequence(
    submit: worker_pb2.Submit, model: TextModel, config: EngineConfig, room: Room, arrived: float
) -> Sequence:
    """The sequence for a request.

    Raises PromptError with the field that is wrong, or TooLargeError if it is the memory, rather than the
    context, that is too small.
    """
    request = submit.request
    stop = _stop(request)
    params = _sampling(request.sampling)
    tokens = _tokens(request, model)
    field = request.WhichOneof("input") or "prompt"
    _check_room(len(tokens) + 1, room, field, f"{len(tokens)} tokens and an answer")
    _check_room(len(tokens) + request.max_tokens, room, "max_tokens", f"{request.max_tokens} and the prompt")
    left = room.context_tokens - len(tokens)
    seed = request.sampling.seed if request.sampling.HasField("seed") else None
    return Sequence(
        id=submit.id,
        tokens=tokens,
        max_tokens=request.max_tokens or min(DEFAULT_MAX_TOKENS, left),
        eos_ids=frozenset() if request.ignore_eos else frozenset(config.tokens.eos_ids),
        text=model.stream(stop),
        params=params,
        rng=np.random.default_rng(seed),
        credit=submit.credit_tokens,
        deadline=arrived + submit.deadline_s if submit.deadline_s > 0 else None,
        timeline=Timeline(arrived=arrived),
    )


def _check_room(tokens: int, room: Room, field: str, what: str) -> None:
    room.pool.check_fits(tokens)
    if tokens > room.context_tokens:
        raise PromptError(field, f"{what} do not fit into the context of {room.context_tokens} tokens")


def _tokens(request: inference_pb2.GenerateRequest, model: TextModel) -> list[int]:
    match request.WhichOneof("input"):
        case "prompt":
            return model.encode(request.prompt)
        case "chat":
            for i, message in enumerate(request.chat.messages):
                if message.role not in _ROLES:
                    raise PromptError(
                        f"chat.messages[{i}].role",
                        f"must be one of {', '.join(_ROLES)}, not {message.role!r}",
                    )
            return model.encode_chat([{"role": m.role, "content": m.content} for m in request.chat.messages])
        case _:
            raise PromptError("input", "set `prompt` or `chat`")


def _sampling(sampling: inference_pb2.Sampling) -> SamplingParams:
    temperature = sampling.temperature
    if not (math.isfinite(temperature) and 0 <= temperature <= 10):
        raise PromptError("sampling.temperature", f"must lie between 0 and 10, not {temperature}")
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise PromptError("sampling.top_p", f"must be above 0 and at most 1, not {top_p}")
    return SamplingParams(temperature, top_p)


def _stop(request: inference_pb2.GenerateRequest) -> tuple[str, ...]:
    if len(request.stop) > _MAX_STOPS:
        raise PromptError("stop", f"at most {_MAX_STOPS} strings, not {len(request.stop)}")
    for i, text in enumerate(request.stop):
        if not 0 < len(text.encode()) <= _MAX_STOP_BYTES:
            raise PromptError(f"stop[{i}]", f"must have 1 to {_MAX_STOP_BYTES} bytes")
    return tuple(request.stop)
