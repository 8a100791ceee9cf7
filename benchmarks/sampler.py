"""What choosing a token costs beside the least that it can: one argmax over the batch's logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.inputs import Inputs
from benchmarks.report import Row
from benchmarks.timing import Samples, take_turns
from edgellm_agent.worker.sampler import Draw, SamplerState, SamplingParams, sample

_VOCAB = 49152
_BATCHES = (1, 8, 32)
_PROMPT_TOKENS, _ANSWER_TOKENS = 1000, 200
# A turn takes about so many tokens: long against the clock's resolution, short against a disturbance.
_TOKENS = 256
_ARGMAX = "argmax"


@dataclass(frozen=True)
class Kind:
    """A way to choose, and whether a grammar and a ban take part."""

    name: str
    params: SamplingParams
    masked: bool = False

    def draw(self, seed: int, allowed: npt.NDArray[np.uint32]) -> Draw:
        """A row in the middle of an answer."""
        tokens = np.random.default_rng(seed).integers(_VOCAB, size=_PROMPT_TOKENS + _ANSWER_TOKENS).tolist()
        state = SamplerState(self.params, tokens[:_PROMPT_TOKENS], seed)
        for token in tokens[_PROMPT_TOKENS:]:
            state.push(token)
        return Draw(state, (0,), allowed) if self.masked else Draw(state)


KINDS = (
    Kind("greedy", SamplingParams()),
    Kind("temperature 1", SamplingParams(1.0)),
    Kind("temperature 0.7, top-p 0.9", SamplingParams(0.7, top_p=0.9)),
    Kind("temperature 1.5, top-p 0.99", SamplingParams(1.5, top_p=0.99)),
    Kind(
        "everything on",
        SamplingParams(
            0.8, 0.95, 100, 0.02, 1.1, 0.2, 0.1, dict.fromkeys(range(0, 1000, 10), 1.0), top_logprobs=5
        ),
        masked=True,
    ),
)


def sampler_cost(inputs: Inputs) -> list[Row]:
    """Microseconds for each token, by kind and batch."""
    return [row for batch in _BATCHES for row in _rows(batch, inputs.rounds)]


def _rows(batch: int, rounds: int) -> list[Row]:
    rng = np.random.default_rng(batch)
    # Zipf's law, as the chances of words go, in another order in each row.
    ranks = np.stack([rng.permutation(_VOCAB) + 1 for _ in range(batch)])
    logits = (-1.2 * np.log(ranks)).astype(np.float32)
    # Half of the tokens, in runs of 32.
    allowed = np.where(rng.random(_VOCAB // 32) < 0.5, 0xFFFFFFFF, 0).astype(np.uint32)

    def chooser(kind: Kind) -> Callable[[], float]:
        draws = [kind.draw(seed, allowed) for seed in range(batch)]
        return partial(_time_us, lambda: sample(logits, draws), batch)

    rivals = {kind.name: chooser(kind) for kind in KINDS}
    rivals[_ARGMAX] = partial(_time_us, lambda: logits.argmax(axis=-1), batch)
    samples = take_turns(rivals, rounds)
    return [_row(kind, batch, samples) for kind in KINDS]


def _row(kind: Kind, batch: int, samples: Samples) -> Row:
    figure = samples.median(kind.name)
    return Row(
        benchmark="sampler",
        what=f"sampling, {kind.name}, batch {batch}",
        ours=f"{figure:.0f} µs",
        peer=f"{samples.median(_ARGMAX):.0f} µs (argmax alone)",
        figure=figure,
        unit="µs/token",
        settings=f"{_VOCAB} logits a row by Zipf's law, one thread, {samples}",
    )


def _time_us(choose: Callable[[], object], batch: int) -> float:
    """Microseconds for each row."""
    turns = max(1, _TOKENS // batch)
    began = time.perf_counter()
    for _ in range(turns):
        choose()
    return (time.perf_counter() - began) / (turns * batch) * 1e6
