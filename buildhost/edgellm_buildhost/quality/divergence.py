"""How far one prediction is from another, token by token; exact to the rounding of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROWS = 8  # of 50,000 logits each: what is computed with stays in the processor's cache


@dataclass(frozen=True)
class Scores:
    """Of tokens in the order of the text, float64 `[tokens]` in nats; `agree` bool: the same likeliest one.

    `reference_nll` and `engine_nll` are -log of the probability that each gave to the token that follows;
    `divergence` is KL(reference || engine).
    """

    reference_nll: NDArray[np.float64]
    engine_nll: NDArray[np.float64]
    divergence: NDArray[np.float64]
    agree: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Those of several pieces, one behind the other."""
        return cls(
            np.concatenate([part.reference_nll for part in parts]),
            np.concatenate([part.engine_nll for part in parts]),
            np.concatenate([part.divergence for part in parts]),
            np.concatenate([part.agree for part in parts]),
        )


def score(
    reference: NDArray[np.float32], engine: NDArray[np.float32], following: NDArray[np.int64]
) -> Scores:
    """Compares finite logits `[tokens, vocab]`; `following` `[tokens]` is what the text has next."""
    pieces = [slice(start, start + _ROWS) for start in range(0, len(following), _ROWS)]
    return Scores.joined([_score(reference[rows], engine[rows], following[rows]) for rows in pieces])


def _score(
    reference: NDArray[np.float32], engine: NDArray[np.float32], following: NDArray[np.int64]
) -> Scores:
    """In float32, but for the sums: of 50,000 terms those would lose what a divergence of 0.001 is made of.

    With a and b the logits below their largest, log p = a - log Σ exp a, and so for q, the divergence is
    Σ p (a - b) - log Σ exp a + log Σ exp b.
    """
    a, b = (logits - logits.max(axis=1, keepdims=True) for logits in (reference, engine))
    p = np.exp(a)
    sum_a, sum_b = p.sum(axis=1, dtype=np.float64), np.exp(b).sum(axis=1, dtype=np.float64)
    log_a, log_b = np.log(sum_a), np.log(sum_b)
    rows = np.arange(len(following))
    nll_a, nll_b = log_a - a[rows, following], log_b - b[rows, following]
    agree = reference.argmax(axis=1) == engine.argmax(axis=1)
    p *= a - b
    divergence = p.sum(axis=1, dtype=np.float64) / sum_a - log_a + log_b
    # Zero is the least there is; rounding may fall below.
    return Scores(nll_a, nll_b, np.maximum(divergence, 0.0), agree)
