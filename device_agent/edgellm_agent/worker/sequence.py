"""A sequence: one request on its way through prefill and decode. It is data; others act on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgellm_agent.worker.sampler import SamplerState
from edgellm_agent.worker.speculation import PromptLookup
from edgellm_agent.worker.structured import Matcher
from edgellm_agent.worker.text import TextStream


@dataclass
class Timeline:
    """Monotonic seconds at which things happened; 0 until they did."""

    arrived: float
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass
class Account:
    """Tokens that were not simply computed once."""

    cached: int = 0
    recomputed: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(eq=False)
class Sequence:
    """State of one request.

    `tokens` are prompt and answer; the KV cache holds the first `computed` of them.
    """

    id: int
    client: str
    tokens: list[int]
    max_tokens: int
    min_tokens: int
    end_ids: frozenset[int]
    text: TextStream
    sampling: SamplerState
    credit: int
    timeline: Timeline
    matcher: Matcher | None = None
    deadline: float | None = None
    lookup: PromptLookup = field(default_factory=PromptLookup)
    account: Account = field(default_factory=Account)
    prompt_tokens: int = field(init=False)
    computed: int = 0
    computed_before: int = 0
    """What had been computed when the sequence last lost its memory."""

    def __post_init__(self) -> None:
        """The prompt is what is there at the beginning."""
        self.prompt_tokens = len(self.tokens)

    @property
    def longest(self) -> int:
        """Longest that it may get, tokens."""
        return self.prompt_tokens + self.max_tokens

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def in_prefill(self) -> bool:
        """Whether tokens before the newest are still to be computed."""
        return len(self.tokens) - self.computed > 1
