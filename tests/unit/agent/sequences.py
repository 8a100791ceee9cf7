"""Sequences for tests, without a model behind them."""

from edgellm_agent.worker.sampler import SamplerState, SamplingParams
from edgellm_agent.worker.sequence import Sequence, Timeline


class NoText:
    """Stands where the text of an answer would be."""

    stopped = False

    def push(self, token, *, may_stop=True):
        return ""

    def finish(self):
        return ""


def make(
    sequence_id,
    prompt=4,
    max_tokens=8,
    *,
    tokens=None,
    client="",
    credit=1000,
    deadline=None,
    params=None,
    seed=0,
    arrived=0.0,
):
    tokens = list(range(1, prompt + 1)) if tokens is None else list(tokens)
    return Sequence(
        id=sequence_id,
        client=client,
        tokens=tokens,
        max_tokens=max_tokens,
        min_tokens=0,
        end_ids=frozenset(),
        text=NoText(),
        sampling=SamplerState(params or SamplingParams(), tokens, seed),
        credit=credit,
        deadline=deadline,
        timeline=Timeline(arrived=arrived),
    )
