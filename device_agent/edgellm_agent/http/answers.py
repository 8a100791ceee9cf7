"""The engine's deltas in OpenAI's two formats: chat completions, and the older text completions."""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgellm.v1 import inference_pb2, worker_pb2

Json = dict[str, Any]
Logprobs = Sequence[inference_pb2.TokenLogprob]

_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}
# JSON has no infinity; OpenAI's own stand-in for "never".
_NEVER = -9999.0


@dataclass(frozen=True)
class Head:
    """What all objects of one answer have in common."""

    id: str
    model: str
    digest: str
    created: int

    @classmethod
    def new(cls, prefix: str, model: str, digest: str) -> Head:
        """A head with an id of its own, made now."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", model, digest, int(time.time()))

    def wrap(self, kind: str, choices: list[Json], **more: Json | None) -> Json:
        """The object around the choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.digest,
            "choices": choices,
            **more,
        }


class Format(Protocol):
    """One of the two formats, for one answer."""

    head: Head
    kind: str
    """`object` of a whole answer."""
    chunk_kind: str
    """`object` of a part of a stream."""

    def first(self) -> list[Json]:
        """Choices that open a stream, before any text."""

    def delta(self, text: str, logprobs: Logprobs | None, reason: str | None) -> Json:
        """Choice of one chunk; `logprobs` is None unless they were asked for."""

    def whole(self, text: str, logprobs: Logprobs | None, reason: str) -> Json:
        """The only choice of an answer in one piece."""


@dataclass
class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    head: Head
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def first(self) -> list[Json]:
        """The role."""
        opening = {"role": "assistant", "content": ""}
        return [{"index": 0, "delta": opening, "logprobs": None, "finish_reason": None}]

    def delta(self, text: str, logprobs: Logprobs | None, reason: str | None) -> Json:
        """New text; the last chunk has none."""
        delta = {} if reason is not None and not text else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": reason}

    def whole(self, text: str, logprobs: Logprobs | None, reason: str) -> Json:
        """The assistant's message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": reason}

    @staticmethod
    def _logprobs(logprobs: Logprobs | None) -> Json | None:
        if logprobs is None:
            return None
        content = [
            _chance(item.token) | {"top_logprobs": [_chance(t) for t in item.top]} for item in logprobs
        ]
        return {"content": content, "refusal": None}


@dataclass
class TextFormat:
    """text_completion, for both."""

    head: Head
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("ignore"), init=False
    )
    _characters: int = field(default=0, init=False)

    def first(self) -> list[Json]:
        """Nothing: the format knows no roles."""
        return []

    def delta(self, text: str, logprobs: Logprobs | None, reason: str | None) -> Json:
        """New text."""
        return {"index": 0, "text": text, "logprobs": self._logprobs(logprobs), "finish_reason": reason}

    def whole(self, text: str, logprobs: Logprobs | None, reason: str) -> Json:
        """The text."""
        return self.delta(text, logprobs, reason)

    def _logprobs(self, logprobs: Logprobs | None) -> Json | None:
        if logprobs is None:
            return None
        return {
            "tokens": [_name(item.token) for item in logprobs],
            "token_logprobs": [_finite(item.token.logprob) for item in logprobs],
            "top_logprobs": [{_name(t): _finite(t.logprob) for t in item.top} for item in logprobs],
            "text_offset": [self._offset(item.token.text) for item in logprobs],
        }

    def _offset(self, token: bytes) -> int:
        """Characters of the answer before this token; one that spans tokens counts with its last."""
        before = self._characters
        self._characters += len(self._decoder.decode(token))
        return before


def reason_of(finished: worker_pb2.Finished) -> str:
    """Why the answer ended, in OpenAI's words."""
    return _REASONS.get(finished.reason, "stop")


def usage_of(finished: worker_pb2.Finished) -> Json:
    """Tokens in and out."""
    usage = finished.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _chance(chance: inference_pb2.TokenChance) -> Json:
    return {
        "token": chance.text.decode(errors="replace"),
        "logprob": _finite(chance.logprob),
        "bytes": list(chance.text),
    }


def _name(chance: inference_pb2.TokenChance) -> str:
    """The token's text as a key; pieces of characters must not all have the same."""
    try:
        return chance.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in chance.text)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _NEVER
