"""Chooses the next token of each row from its logits.

A row goes through these, in this order; what is at its default costs nothing:

1. logit bias, added; -100 bans
2. penalties: repetition, then presence and frequency
3. bans and the grammar's mask
4. temperature; 0 takes the likeliest token, and the rest does not apply
5. top-k, top-p, min-p: each sees the temperature-scaled probabilities of what the one before it left
6. one draw

Sources. Repetition penalty: Keskar et al., "CTRL", 2019, section 4.1; a negative logit is multiplied, since
to divide it would reward the token. Presence and frequency penalty: OpenAI's API reference. Top-k: Fan et
al., "Hierarchical Neural Story Generation", 2018. Top-p: Holtzman et al., "The Curious Case of Neural Text
Degeneration", 2020. Min-p: Nguyen et al., "Turning Up the Heat", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm_agent.runtimes.base import Logits

Scores = npt.NDArray[np.float32]
"""The logits of one row, [vocab]."""
Ids = npt.NDArray[np.intp]
Weights = npt.NDArray[np.float64]

NO_TOKEN = -1
"""In a choice: the logits were not finite, or nothing was allowed. Never a token's id."""

# A logit bias of this or less is a ban, at any temperature.
_BAN_BIAS = -100.0
# What top-p keeps is nearly always among so many.
_LIKELY = 256
# If not: bins, down to so far below the largest on the logarithmic scale. What is deeper shares a bin.
_BINS = 4096
_DEPTH = 40.0
# A draw looks for its place among sums of so many weights first.
_RUN = 256
_LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the ranges are those of `edgellm.v1.Sampling`, checked by `requests`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    """How many alternatives come with a token's log probability; None asks for none at all."""

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens have been seen."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplerState:
    """What choosing the next token of one sequence depends on, its logits apart.

    Only `push` changes it: the draw of the n-th token follows from seed and n alone, so a row that is sampled
    again gives the same token again.

    Args:
        params: How tokens are chosen.
        prompt: Token ids that only the repetition penalty sees.
        seed: None means a random one.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], seed: int | None) -> None:
        self.params = params
        self._rng = np.random.default_rng(seed) if params.temperature > 0 else None
        self.uniform = self._rng.random() if self._rng else 0.0
        """What the next draw is made with, in [0, 1)."""
        self._biased: Ids = np.fromiter(params.logit_bias.keys(), np.intp, len(params.logit_bias))
        bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self._bias: Scores = np.where(bias <= _BAN_BIAS, np.float32(-np.inf), bias)
        seen = prompt if params.repetition_penalty != 1 else ()
        self._counts = _Counts(seen) if params.penalizes else None

    def push(self, token: int) -> None:
        """Takes a token that joined the answer."""
        if self._counts is not None:
            self._counts.add(token)
        if self._rng is not None:
            self.uniform = self._rng.random()

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` does anything."""
        return len(self._biased) > 0 or self._counts is not None

    def adjust(self, scores: Scores) -> None:
        """Adds the biases and applies the penalties, in place."""
        scores[self._biased] += self._bias
        if self._counts is None:
            return
        params, ids, counts = self.params, self._counts.ids, self._counts.in_answer
        seen = scores[ids].astype(np.float64)
        penalty = params.repetition_penalty
        seen = np.where(seen > 0, seen / penalty, seen * penalty)
        seen -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        # A penalty near 0 asks for more than float32 can hold; then more is the most, not infinity.
        with np.errstate(over="ignore"):
            scores[ids] = np.minimum(seen, _LARGEST)


class _Counts:
    """How often each token is in the answer; those of the prompt alone are there 0 times.

    Sparse: an entry for each token seen, in arrays that grow by doubling.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids: Ids = np.unique(np.asarray(prompt, np.intp))
        self._in_answer: Weights = np.zeros(len(self._ids))
        self._entries = {int(token): entry for entry, token in enumerate(self._ids)}

    def add(self, token: int) -> None:
        """Counts a token of the answer."""
        entry = self._entries.setdefault(token, len(self._entries))
        if entry == len(self._ids):
            self._ids = np.resize(self._ids, max(16, 2 * entry))
            self._in_answer = np.concatenate([self._in_answer, np.zeros(len(self._ids) - entry)])
        self._ids[entry] = token
        self._in_answer[entry] += 1

    @property
    def ids(self) -> Ids:
        """Each token seen, once."""
        return self._ids[: len(self._entries)]

    @property
    def in_answer(self) -> Weights:
        """How often each of `ids` is in the answer."""
        return self._in_answer[: len(self._entries)]


@dataclass(frozen=True)
class Draw:
    """A row to draw a token from."""

    state: SamplerState
    banned: Sequence[int] = ()
    """Token ids that may not come now, for example end tokens before `min_tokens`."""
    allowed: npt.NDArray[np.uint32] | None = None
    """A grammar's mask, [ceil(vocab / 32)]: token t may come if bit t % 32 of word t // 32 is set.

    Tokens that a shorter mask does not reach may not come: embeddings are often padded beyond the tokenizer.
    """


@dataclass(frozen=True)
class Choice:
    """The token that a row gave, or NO_TOKEN; log probabilities only if asked for.

    They are natural logarithms of the model's own distribution: before temperature, penalties, bias and mask.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest first; fewer than asked for if the model rules the others out."""


def sample(logits: Logits, draws: Sequence[Draw]) -> list[Choice]:
    """One choice for each row of `logits`, float32 [n, vocab]; row i belongs to draw i and to no other.

    The logits are not changed. A row whose logits are NaN, or have no finite maximum, or of which nothing is
    allowed, gives NO_TOKEN; the others are answered all the same.
    """
    likeliest = logits.argmax(axis=-1)
    return [_choose(logits[i], draw, int(likeliest[i])) for i, draw in enumerate(draws)]


def distribution(row: Scores, draw: Draw) -> tuple[Ids, Weights]:
    """What a token is drawn from if the temperature is above 0: ids, and weights that their chances go by.

    Empty if nothing is allowed. The row's maximum must be finite.
    """
    scores = _adjusted(row, draw)
    peak = float(scores.max())
    if peak == -np.inf:
        return np.empty(0, np.intp), np.empty(0)
    return _kept(scores, peak, draw.state.params)


def _choose(row: Scores, draw: Draw, likeliest: int) -> Choice:
    # NaN counts as a maximum, so this finds it too.
    if not np.isfinite(row[likeliest]):
        return Choice(NO_TOKEN)
    params = draw.state.params
    token = _drawn(row, draw) if params.temperature > 0 else _greedy(row, draw, likeliest)
    if token == NO_TOKEN or params.top_logprobs is None:
        return Choice(token)
    return _with_logprobs(row, token, params.top_logprobs)


def _greedy(row: Scores, draw: Draw, likeliest: int) -> int:
    scores = _adjusted(row, draw)
    if scores is row:
        return likeliest
    token = int(scores.argmax())
    return token if scores[token] > -np.inf else NO_TOKEN


def _drawn(row: Scores, draw: Draw) -> int:
    ids, weights = distribution(row, draw)
    return int(ids[_pick(weights, draw.state.uniform)]) if len(ids) else NO_TOKEN


def _pick(weights: Weights, uniform: float) -> int:
    """Index of the weight in which `uniform` of the sum of all is reached; never one that is 0.

    First the run of weights, then the one: eight times as fast as one cumulative sum of 49,152, in which each
    addition waits for the one before.
    """
    runs = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _RUN)))
    wanted = uniform * float(runs[-1])
    run = int(np.searchsorted(runs, wanted, side="right"))
    sums = np.cumsum(weights[run * _RUN : (run + 1) * _RUN])
    missing = wanted - (float(runs[run - 1]) if run else 0.0)
    # Sums of another order are rounded otherwise, which must not lead out of the run.
    missing = min(missing, math.nextafter(float(sums[-1]), 0.0))
    return run * _RUN + int(np.searchsorted(sums, missing, side="right"))


def _adjusted(row: Scores, draw: Draw) -> Scores:
    """The row after bias, penalties, bans and mask; the row itself if there are none, else a copy."""
    if not draw.state.adjusts and not len(draw.banned) and draw.allowed is None:
        return row
    scores: Scores = row.copy()
    draw.state.adjust(scores)
    scores[np.asarray(draw.banned, np.intp)] = -np.inf
    if draw.allowed is not None:
        octets = np.ascontiguousarray(draw.allowed, "<u4").view(np.uint8)
        bits = np.unpackbits(octets, bitorder="little", count=len(scores))
        # +inf where allowed, else -inf. A boolean index takes five times as long for an irregular mask.
        limits = (bits.astype(np.float32) - np.float32(0.5)) * np.float32(np.inf)
        np.minimum(scores, limits, out=scores)
    return scores


def _kept(scores: Scores, peak: float, params: SamplingParams) -> tuple[Ids, Weights]:
    """What top-k, top-p and min-p leave."""
    if 0 < params.top_k < len(scores):
        ids = _likeliest(scores, params.top_k)
        scaled = _scaled(scores[ids], peak, params.temperature)
    else:
        ids = np.arange(len(scores))
        scaled = _scaled(scores, peak, params.temperature)
    weights = np.exp(scaled)
    if params.top_p < 1:
        kept = _nucleus(scaled, weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0:
        # The likeliest weighs 1.
        likely = weights >= params.min_p
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def _scaled(scores: Scores, peak: float, temperature: float) -> Weights:
    """Logarithms of the probabilities up to a constant; that of `peak` is 0.

    Double precision, and the peak taken away first: a temperature of 1e-3 would overflow float32.
    """
    scaled = np.subtract(scores, peak, dtype=np.float64)
    if temperature != 1:
        scaled /= temperature
    return scaled


def _nucleus(scaled: Weights, weights: Weights, top_p: float) -> Ids:
    """Indices of the fewest weights, largest first, whose share of all reaches top_p: at least one.

    Nearly always they are among the likely few. If not, weights are counted in bins and only the bin of the
    last one is sorted: on 49,152 flat weights 20 times as fast as to sort all.
    """
    wanted = top_p * weights.sum()
    likely = _likeliest(scaled, _LIKELY)
    cumulative = np.cumsum(weights[likely])
    if cumulative[-1] >= wanted or len(likely) == len(weights):
        return likely[: np.searchsorted(cumulative, wanted) + 1]
    bins = np.minimum(scaled * (-_BINS / _DEPTH), _BINS - 1).astype(np.intp)
    cumulative = np.cumsum(np.bincount(bins, weights, _BINS))
    last = min(int(np.searchsorted(cumulative, wanted)), _BINS - 1)
    surely, perhaps = np.flatnonzero(bins < last), np.flatnonzero(bins == last)
    perhaps = perhaps[np.argsort(-scaled[perhaps], kind="stable")]
    missing = wanted - (cumulative[last - 1] if last else 0.0)
    count = np.searchsorted(np.cumsum(weights[perhaps]), missing) + 1
    return np.concatenate([surely, perhaps[:count]])


def _likeliest(scores: npt.NDArray[np.floating[Any]], count: int) -> Ids:
    """Ids of the highest scores, highest first and lower ids before equal ones; none that is -inf.

    Scores are dealt into four times as many groups as are wanted. The groups' maxima are scores too, so the
    `count`-th highest of them is a floor under the `count`-th highest score, and few others are above it:
    ten times as fast as numpy's argpartition for 256 of 49,152.
    """
    floor = -np.inf
    if count < len(scores):
        size = max(1, len(scores) // (4 * count))
        maxima = scores[: len(scores) // size * size].reshape(size, -1).max(axis=0)
        floor = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    above = np.flatnonzero(scores >= floor if floor > -np.inf else scores > floor)
    return above[np.argsort(-scores[above], kind="stable")[:count]]


def _with_logprobs(row: Scores, token: int, top: int) -> Choice:
    peak = float(row.max())
    log_total = float(np.log(np.exp(_scaled(row, peak, 1.0)).sum()))

    def logprob(token: int) -> float:
        return float(row[token]) - peak - log_total

    ids = _likeliest(row, top).tolist() if top else []
    return Choice(token, logprob(token), tuple((other, logprob(other)) for other in ids))
