"""Chooses the next token of each sequence from its logits.

Greedy, or temperature with nucleus (top-p) sampling.

Nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from edgellm_agent.runtimes.base import Logits
from edgellm_agent.worker.sequence import SamplingParams, Sequence

# The nucleus is nearly always among these; only if it is not are all tokens sorted.
_LIKELY = 256


def sample(logits: Logits, sequences: Seq[Sequence]) -> list[int]:
    """One token id for each row of `logits` [n, vocab], float32; row i belongs to sequence i."""
    tokens = [int(t) for t in logits.argmax(axis=-1)]
    for i, sequence in enumerate(sequences):
        if sequence.params.temperature > 0:
            tokens[i] = _draw(logits[i], sequence.params, sequence.rng)
    return tokens


def _draw(logits: npt.NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    # Double precision: a temperature of 1e-3 would overflow float32.
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    nucleus = _nucleus(weights, params.top_p)
    cumulative = np.cumsum(weights[nucleus])
    position = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(nucleus[min(int(position), len(nucleus) - 1)])


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the fewest tokens, likeliest first, whose share of the probability reaches top_p.

    Always at least one.
    """
    if top_p >= 1:
        return np.arange(len(weights))
    wanted = top_p * weights.sum()
    likely = min(_LIKELY, len(weights))
    order = np.argpartition(-weights, likely - 1)[:likely]
    if weights[order].sum() < wanted:
        order = np.arange(len(weights))
    order = order[np.argsort(-weights[order], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
    return order[:count]
