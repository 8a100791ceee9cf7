"""What both clients ask of a model and what it answers, translated to and from protobuf."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgellm.client._model import word
from edgellm.errors import RemoteError
from edgellm.v1 import inference_pb2


@dataclass(frozen=True)
class Message:
    """A turn of a chat; the role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what is None is left to the device. It refuses what is out of range, by name.

    The steps go in this order: logit bias, penalties, temperature, top-k, top-p, min-p.

    Args:
        temperature: 0 is greedy, and only bias and penalties matter then. At most 10.
        top_p: Probability mass kept, in (0, 1].
        seed: Same seed, same engine and same load: same text. None means a random one.
        top_k: Only so many likeliest tokens; 0 means all.
        min_p: Only tokens at least so likely as this share of the likeliest, in [0, 1]; 0 means all.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens in prompt or
            answer, in (0, 10].
        presence_penalty: Subtracted from the logits of tokens in the answer, in [-2, 2].
        frequency_penalty: Subtracted once for each time that the token is in the answer, in [-2, 2].
        logit_bias: Added to the logit of a token id, in [-100, 100]; -100 bans it. At most 1024 entries.
    """

    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def to_proto(self) -> inference_pb2.Sampling:
        """The same as a protobuf message; raises ValueError for a negative count or id."""
        # None is how protobuf's constructor leaves a field unset.
        return inference_pb2.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
        )


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like, enforced token by token; made by one of its three constructors.

    The device compiles it once and keeps it. A text has at most 64 KiB.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any]) -> Constraint:
        """A JSON Schema, as JSON text or as what that text means; {} takes any JSON value."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A regular expression in Rust's syntax; the whole answer must match."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """A Lark grammar with the start rule `start`."""
        return cls("lark", grammar)

    def to_proto(self) -> inference_pb2.Constraint:
        """The same as a protobuf message."""
        message = inference_pb2.Constraint()
        setattr(message, self.kind, self.text)
        return message


@dataclass(frozen=True)
class TokenChance:
    """A token and how likely it was: the natural logarithm, of the model's own distribution.

    That is before temperature, penalties, bias and constraint. The text is bytes, since a token may be a part
    of a character.
    """

    id: int
    logprob: float
    text: bytes

    @classmethod
    def from_proto(cls, message: inference_pb2.TokenChance) -> TokenChance:
        """The same facts from a protobuf message."""
        return cls(message.id, message.logprob, message.text)


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, and the likeliest alternatives in its place, likeliest first."""

    token: TokenChance
    top: tuple[TokenChance, ...]

    @classmethod
    def from_proto(cls, message: inference_pb2.TokenLogprob) -> TokenLogprob:
        """The same facts from a protobuf message."""
        return cls(TokenChance.from_proto(message.token), tuple(map(TokenChance.from_proto, message.top)))


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; `logprobs` has one for each token if they were asked for, else none."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished answer and what it cost; the finish reason is "stop" or "length".

    Of the prompt's tokens, `cached_tokens` were found in the KV cache of other requests and not computed
    again; `recomputed_tokens` were, because the memory was needed elsewhere for a while. `draft_tokens` were
    guessed and verified several at once; the accepted ones are part of `completion_tokens`.
    """

    request_id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    kv_bytes: int
    queue_s: float
    ttft_s: float
    decode_s: float
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    @classmethod
    def from_proto(cls, message: inference_pb2.GenerateResponse, text: str) -> Completion:
        """The last message of a stream, and the whole text."""
        usage, timings = message.usage, message.timings
        return cls(
            request_id=message.request_id,
            text=text,
            finish_reason=word(inference_pb2.FinishReason.Name, message.finish_reason, "FINISH_REASON_"),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            kv_bytes=usage.kv_bytes,
            queue_s=timings.queue_s,
            ttft_s=timings.ttft_s,
            decode_s=timings.decode_s,
            cached_tokens=usage.cached_tokens,
            recomputed_tokens=usage.recomputed_tokens,
            draft_tokens=usage.draft_tokens,
            accepted_draft_tokens=usage.accepted_draft_tokens,
        )

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed after the first token; 0 if there was no second one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class GenerationState:
    """What a stream of answers has brought so far."""

    texts: list[str] = field(default_factory=list)
    completion: Completion | None = None

    def take(self, message: inference_pb2.GenerateResponse) -> Chunk | None:
        """The piece that a message brings; None if it only says how the answer ended."""
        self.texts.append(message.text)
        if message.finish_reason:
            self.completion = Completion.from_proto(message, "".join(self.texts))
        if not message.text and not message.token_ids:
            return None
        logprobs = tuple(map(TokenLogprob.from_proto, message.logprobs))
        return Chunk(message.text, tuple(message.token_ids), logprobs)

    def finished(self) -> Completion:
        """The summary; raises RemoteError if the stream ended without one."""
        if self.completion is None:
            raise RemoteError(
                "the answer ended early", code="INTERNAL", hint="see the agent's log on the device"
            )
        return self.completion


def generate_request(
    prompt: str | Sequence[Message],
    *,
    model: str,
    sampling: Sampling | None,
    max_tokens: int,
    stop: Iterable[str],
    ignore_eos: bool,
    min_tokens: int,
    stop_token_ids: Iterable[int],
    top_logprobs: int | None,
    constraint: Constraint | None,
) -> inference_pb2.GenerateRequest:
    """Text that is tokenized as it is, or messages that go through the model's chat template."""
    request = inference_pb2.GenerateRequest(
        model=model,
        sampling=(sampling or Sampling()).to_proto(),
        max_tokens=max_tokens,
        stop=list(stop),
        ignore_eos=ignore_eos,
        min_tokens=min_tokens,
        stop_token_ids=list(stop_token_ids),
        top_logprobs=top_logprobs,
        constraint=constraint.to_proto() if constraint else None,
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.chat.SetInParent()
        for message in prompt:
            request.chat.messages.add(role=message.role, content=message.content)
    return request


def client_metadata(client_id: str | None) -> tuple[tuple[str, str], ...]:
    """Says who asks: a device shares its time fairly between clients, and cannot tell them apart otherwise.

    None makes a random name. Raises ValueError for one that gRPC cannot carry.
    """
    name = uuid.uuid4().hex if client_id is None else client_id
    if not (name.isascii() and name.isprintable() and name.strip() == name and 0 < len(name) <= 128):
        raise ValueError(f"client_id must have 1 to 128 printable ASCII characters, not {name!r}")
    return (("edgellm-client", name),)
