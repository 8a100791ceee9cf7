"""Who is measured against whom, in which workloads, and what has to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.graph_model import GraphModel, decode_rate, prefill_rate
from edgellm_buildhost.recipe import QuantName

_PROMPT_TOKENS = 32
_DECODE_STEPS = 96
_PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Workload:
    """Decoding so many streams, or computing a prompt where there are none."""

    name: str
    settings: str
    streams: int

    def rate(self, model: GraphModel, text: Sequence[int]) -> float:
        """Tokens per second."""
        if self.streams == 0:
            return prefill_rate(model, text, _PREFILL_TOKENS)
        return decode_rate(
            model, text, streams=self.streams, prompt_tokens=_PROMPT_TOKENS, steps=_DECODE_STEPS
        )


_DECODE = f"{_PROMPT_TOKENS}-token prompts, {_DECODE_STEPS} steps"
WORKLOADS = (
    Workload("decode, 1 stream", _DECODE, streams=1),
    Workload("decode, 4 streams", _DECODE, streams=4),
    Workload(f"prefill of {_PREFILL_TOKENS} tokens", "one batch", streams=0),
)


@dataclass(frozen=True)
class Contest:
    """A precision of ours, its peers, and floors and goals in the order of the workloads."""

    precision: QuantName
    peers: tuple[str, ...]
    floors: tuple[float, float, float]
    goals: tuple[float, float, float]
    goal_of_bound: float


INT8 = Contest(QuantName.INT8, ("Q8_0",), (1.2, 1.3, 0.8), (1.5, 1.6, 2.0), 70)
INT4 = Contest(
    QuantName.INT4,
    ("Q4_0", "Q4_1", "IQ4_NL", "Q4_K_S", "Q4_K_M"),
    (1.1, 1.2, 0.8),
    (1.5, 1.5, 2.0),
    50,
)
