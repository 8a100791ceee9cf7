"""Sequences for tests, without a model behind them."""

import numpy as np

from edgellm_agent.worker.sequence import SamplingParams, Sequence, Timeline


class NoText:
    """Stands where the text of an answer would be."""

    stopped = False

    def push(self, token):
        return ""

    def finish(self):
        return ""


def make(sequence_id, prompt=4, max_tokens=8, *, credit=1000, deadline=None, params=None, seed=0):
    return Sequence(
        id=sequence_id,
        tokens=list(range(1, prompt + 1)),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
        text=NoText(),
        params=params or SamplingParams(),
        rng=np.random.default_rng(seed),
        credit=credit,
        deadline=deadline,
        timeline=Timeline(arrived=0.0),
    )
