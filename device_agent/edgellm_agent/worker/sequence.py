"""A sequence: one request on its way through prefill and decode. It is data; others act on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgellm_agent.worker.text import TextStream


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0


@dataclass
class Timeline:
    """Monotonic seconds at which things happened; 0 until they did."""

    arrived: float
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(eq=False)
class Sequence:
    """State of one request.

    `tokens` are prompt and answer; the KV cache holds the first `computed` of them.
    """

    id: int
    tokens: list[int]
    max_tokens: int
    eos_ids: frozenset[int]
    text: TextStream
    params: SamplingParams
    rng: np.random.Generator
    credit: int
    deadline: float | None
    timeline: Timeline
    prompt_tokens: int = field(init=False)
    computed: int = 0

    def __post_init__(self) -> None:
        """The prompt is what is there at the beginning."""
        self.prompt_tokens = len(self.tokens)

    @property
    def promised_tokens(self) -> int:
        """Longest that it may get."""
        return self.prompt_tokens + self.max_tokens

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def in_prefill(self) -> bool:
        """Whether tokens before the newest are still to be computed."""
        return self.computed < self.prompt_tokens
