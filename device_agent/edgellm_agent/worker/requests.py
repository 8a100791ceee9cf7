"""Checks a request and says in our own words what it asks for.

Pure functions, so that another thread than the loop's may call them. What is cheap to refuse is refused
before anything is tokenized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgellm.bundle.config import EngineConfig
from edgellm.v1 import inference_pb2
from edgellm_agent.worker.sampler import SamplingParams
from edgellm_agent.worker.structured import MAX_TEXT_BYTES
from edgellm_agent.worker.text import PromptError

DEFAULT_MAX_TOKENS = 512
_MAX_STOPS = 16
_MAX_STOP_BYTES = 256
_MAX_STOP_TOKENS = 64
_MAX_BIASES = 1024
_MAX_TOP_LOGPROBS = 20
_MAX_MESSAGES = 4096
_ROLES = ("system", "user", "assistant")


class TooLongError(PromptError):
    """Prompt and answer are longer than the context; they would take at least so many `tokens`.

    The context may be short for want of memory: whoever knows the KV cache can say that instead.
    """

    def __init__(self, field: str, message: str, tokens: int) -> None:
        super().__init__(field, message)
        self.tokens = tokens


class PromptEncoder(Protocol):
    """What is needed of a `TextModel`."""

    @property
    def longest_token_bytes(self) -> int:
        """Most bytes of a prompt that one token can stand for."""

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a plain prompt; raises PromptError."""

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as text; raises PromptError."""

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of such a text; raises PromptError."""


@dataclass(frozen=True)
class Ending:
    """What ends an answer, its length apart."""

    end_ids: frozenset[int]
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """How short and how long an answer may be, tokens."""

    min_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class ParsedRequest:
    """A request whose every field is known to be good for the engine."""

    tokens: list[int]
    """The prompt."""
    max_tokens: int
    """What the request says or, if it does not, the default or what the context leaves."""
    min_tokens: int
    end_ids: frozenset[int]
    """Any of these ends the answer and is not part of it."""
    stop: tuple[str, ...]
    sampling: SamplingParams
    seed: int | None
    """None means a random one."""
    constraint: inference_pb2.Constraint | None
    """What the answer must look like; checked for size alone."""


def parse_request(
    request: inference_pb2.GenerateRequest, model: PromptEncoder, config: EngineConfig, context_tokens: int
) -> ParsedRequest:
    """The request, checked; raises PromptError with the path of the first field that is wrong.

    It is a TooLongError if a longer context would do.

    Args:
        request: As it came.
        model: Turns the prompt into tokens.
        config: The engine's: its vocabulary and end tokens.
        context_tokens: Longest prompt plus answer.
    """
    sampling = check_sampling(request, config.model.vocab_size)
    ending = check_ending(request, config)
    constraint = check_constraint(request)
    _check_text(request, model.longest_token_bytes, context_tokens)
    tokens = _encode(request, model, context_tokens)
    lengths = check_lengths(request, len(tokens), context_tokens)
    return ParsedRequest(
        tokens=tokens,
        max_tokens=lengths.max_tokens,
        min_tokens=lengths.min_tokens,
        end_ids=ending.end_ids,
        stop=ending.stop,
        sampling=sampling,
        seed=request.sampling.seed if request.sampling.HasField("seed") else None,
        constraint=constraint,
    )


def check_sampling(request: inference_pb2.GenerateRequest, vocab_size: int) -> SamplingParams:
    """How tokens are chosen; what is unset has its default. Raises PromptError."""
    given = request.sampling
    penalty = given.repetition_penalty if given.HasField("repetition_penalty") else 1.0
    return SamplingParams(
        temperature=_within("sampling.temperature", given.temperature, 0, 10),
        top_p=_above_0("sampling.top_p", given.top_p if given.HasField("top_p") else 1.0, 1),
        top_k=given.top_k,
        min_p=_within("sampling.min_p", given.min_p, 0, 1),
        repetition_penalty=_above_0("sampling.repetition_penalty", penalty, 10),
        presence_penalty=_within("sampling.presence_penalty", given.presence_penalty, -2, 2),
        frequency_penalty=_within("sampling.frequency_penalty", given.frequency_penalty, -2, 2),
        logit_bias=_logit_bias(given, vocab_size),
        top_logprobs=_top_logprobs(request),
    )


def check_ending(request: inference_pb2.GenerateRequest, config: EngineConfig) -> Ending:
    """End tokens and stop strings; raises PromptError."""
    _check_count("stop", len(request.stop), _MAX_STOPS, "strings")
    for i, text in enumerate(request.stop):
        if not 0 < len(text.encode()) <= _MAX_STOP_BYTES:
            raise PromptError(f"stop[{i}]", f"must have 1 to {_MAX_STOP_BYTES} bytes")
    _check_count("stop_token_ids", len(request.stop_token_ids), _MAX_STOP_TOKENS, "tokens")
    vocab_size = config.model.vocab_size
    for i, token in enumerate(request.stop_token_ids):
        _check_token(f"stop_token_ids[{i}]", token, vocab_size)
    eos = () if request.ignore_eos else config.tokens.eos_ids
    # An end token beyond the logits never comes; to forbid it would be an index out of range.
    known = (token for token in eos if 0 <= token < vocab_size)
    return Ending(frozenset((*known, *request.stop_token_ids)), tuple(dict.fromkeys(request.stop)))


def check_constraint(request: inference_pb2.GenerateRequest) -> inference_pb2.Constraint | None:
    """The constraint, if there is one; raises PromptError if it is empty or too long."""
    if not request.HasField("constraint"):
        return None
    kind = request.constraint.WhichOneof("kind")
    if kind is None:
        raise PromptError("constraint", "set `json_schema`, `regex` or `lark`")
    size = len(getattr(request.constraint, kind).encode())
    if not 0 < size <= MAX_TEXT_BYTES:
        raise PromptError(f"constraint.{kind}", f"must have 1 to {MAX_TEXT_BYTES} bytes, not {size}")
    return request.constraint


def check_lengths(request: inference_pb2.GenerateRequest, prompt_tokens: int, context_tokens: int) -> Lengths:
    """How long the answer may be after so many tokens of prompt; raises PromptError."""
    left = context_tokens - prompt_tokens
    if left < 1:
        what = f"{prompt_tokens} tokens and an answer do not fit into the context of {context_tokens} tokens"
        raise TooLongError(_input_field(request), what, prompt_tokens + 1)
    if request.max_tokens > left:
        what = f"the prompt leaves {left} of the context's {context_tokens} tokens, not {request.max_tokens}"
        raise TooLongError("max_tokens", what, prompt_tokens + request.max_tokens)
    max_tokens = request.max_tokens or min(DEFAULT_MAX_TOKENS, left)
    if request.min_tokens > max_tokens:
        source = "" if request.max_tokens else ", which max_tokens is unless it is set"
        what = f"must be at most max_tokens: {request.min_tokens} is more than {max_tokens}{source}"
        raise PromptError("min_tokens", what)
    return Lengths(request.min_tokens, max_tokens)


def _logit_bias(sampling: inference_pb2.Sampling, vocab_size: int) -> dict[int, float]:
    _check_count("sampling.logit_bias", len(sampling.logit_bias), _MAX_BIASES, "tokens")
    biases = dict(sampling.logit_bias)
    for token, bias in biases.items():
        path = f"sampling.logit_bias[{token}]"
        _check_token(path, token, vocab_size)
        _within(path, bias, -100, 100)
    return biases


def _top_logprobs(request: inference_pb2.GenerateRequest) -> int | None:
    if not request.HasField("top_logprobs"):
        return None
    return int(_within("top_logprobs", request.top_logprobs, 0, _MAX_TOP_LOGPROBS))


def _check_text(
    request: inference_pb2.GenerateRequest, longest_token_bytes: int, context_tokens: int
) -> None:
    """Refuses what is wrong or far too long before it is tokenized."""
    match request.WhichOneof("input"):
        case "prompt":
            size = len(request.prompt.encode())
        case "chat":
            _check_count("chat.messages", len(request.chat.messages), _MAX_MESSAGES, "messages")
            for i, message in enumerate(request.chat.messages):
                if message.role not in _ROLES:
                    what = f"must be one of {', '.join(_ROLES)}, not {message.role!r}"
                    raise PromptError(f"chat.messages[{i}].role", what)
            size = sum(len(message.content.encode()) for message in request.chat.messages)
        case _:
            raise PromptError("input", "set `prompt` or `chat`")
    _check_size(_input_field(request), size, longest_token_bytes, context_tokens)


def _check_size(field: str, size: int, longest_token_bytes: int, context_tokens: int) -> None:
    """Refuses a text of so many bytes that has more tokens than the context, whatever they are."""
    least_tokens = -(-size // longest_token_bytes)
    # An answer needs a token too.
    if least_tokens >= context_tokens:
        what = f"{size} bytes are at least {least_tokens} tokens, which do not fit into the context of"
        raise TooLongError(field, f"{what} {context_tokens} tokens", least_tokens + 1)


def _encode(request: inference_pb2.GenerateRequest, model: PromptEncoder, context_tokens: int) -> list[int]:
    if request.WhichOneof("input") == "prompt":
        return model.encode(request.prompt)
    text = model.render_chat([{"role": m.role, "content": m.content} for m in request.chat.messages])
    # A template may make much of little.
    _check_size("chat", len(text.encode()), model.longest_token_bytes, context_tokens)
    tokens = model.encode_rendered(text)
    if not tokens:
        raise PromptError("chat.messages", "the model's chat template makes nothing of them")
    return tokens


def _input_field(request: inference_pb2.GenerateRequest) -> str:
    return request.WhichOneof("input") or "input"


def _within(path: str, value: float, low: float, high: float) -> float:
    # False for NaN too.
    if not low <= value <= high:
        raise PromptError(path, f"must lie between {low} and {high}, not {value:g}")
    return value


def _above_0(path: str, value: float, high: float) -> float:
    if not 0 < value <= high:
        raise PromptError(path, f"must be above 0 and at most {high}, not {value:g}")
    return value


def _check_token(path: str, token: int, vocab_size: int) -> None:
    if token >= vocab_size:
        raise PromptError(path, f"the model's tokens are 0 to {vocab_size - 1}, not {token}")


def _check_count(path: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise PromptError(path, f"at most {most} {what}, not {count}")
