"""The contract of a graph that is measured, ours or a peer's, and what is measured on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
CONTEXT_TOKENS = 1024
MAX_STREAMS = 4
_CHUNK_TOKENS = 512


class GraphModel(Protocol):
    """A loaded model with a KV cache for `MAX_STREAMS` sequences of `CONTEXT_TOKENS` tokens."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    @property
    def step_bytes(self) -> int:
        """Weights that a decode step reads, bytes."""

    def prefill(self, stream: int, tokens: Sequence[int], past_len: int, *, every: bool = False) -> Logits:
        """Appends tokens to one sequence; logits of the last token, or of `every` one."""

    def decode(self, tokens: Sequence[int], past_len: int) -> Logits:
        """Appends one token to each of the first sequences; their logits."""

    def clear(self) -> None:
        """Forgets all sequences."""

    def close(self) -> None:
        """Gives its memory back."""


def decode_rate(
    model: GraphModel, text: Sequence[int], *, streams: int, prompt_tokens: int, steps: int
) -> float:
    """Tokens per second of all streams together; each reads on in its own part of the text."""
    model.clear()
    parts = [text[i * 200 :] for i in range(streams)]
    for stream, part in enumerate(parts):
        model.prefill(stream, part[:prompt_tokens], 0)
    began = time.perf_counter()
    for past_len in range(prompt_tokens, prompt_tokens + steps):
        model.decode([part[past_len % len(part)] for part in parts], past_len)
    return streams * steps / (time.perf_counter() - began)


def prefill_rate(model: GraphModel, text: Sequence[int], tokens: int) -> float:
    """Tokens per second of one prompt, computed as one batch."""
    model.clear()
    began = time.perf_counter()
    model.prefill(0, text[:tokens], 0)
    return tokens / (time.perf_counter() - began)


def perplexity(model: GraphModel, text: Sequence[int]) -> float:
    """Of the text as one sequence, in chunks of 512 tokens."""
    model.clear()
    loss = 0.0
    for start in range(0, len(text) - 1, _CHUNK_TOKENS):
        chunk = text[start : start + _CHUNK_TOKENS]
        logits = model.prefill(0, chunk, start, every=True).astype(np.float64)
        wanted = text[start + 1 : start + 1 + len(chunk)]
        logits = logits[: len(wanted)] - logits[: len(wanted)].max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(wanted)), wanted]
        loss += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
    return float(np.exp(loss / (len(text) - 1)))
