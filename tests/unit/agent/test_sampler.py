import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.worker.sampler import sample
from edgellm_agent.worker.sequence import SamplingParams
from tests.unit.agent.sequences import make


def draw(logits, params, n=4000, seed=0):
    sequence = make(1, params=params, seed=seed)
    row = np.asarray([logits], np.float32)
    return np.bincount([sample(row, [sequence])[0] for _ in range(n)], minlength=len(logits)) / n


def test_greedy_rows_and_sampled_rows_share_a_batch():
    logits = np.asarray([[0, 9, 1], [5, 0, 1]], np.float32)
    sequences = [make(1), make(2, params=SamplingParams(temperature=1e-4))]
    assert sample(logits, sequences) == [1, 0]


def test_temperature_one_draws_by_the_softmax():
    logits = np.log([0.5, 0.3, 0.2])
    assert np.allclose(draw(logits, SamplingParams(1.0)), [0.5, 0.3, 0.2], atol=0.03)


def test_temperature_sharpens():
    logits = np.log([0.6, 0.4])
    expected = np.array([0.6**2, 0.4**2]) / (0.6**2 + 0.4**2)
    assert np.allclose(draw(logits, SamplingParams(0.5)), expected, atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    shares = draw(np.log([0.5, 0.3, 0.15, 0.05]), SamplingParams(1.0, top_p=0.7))
    assert np.allclose(shares, [0.5 / 0.8, 0.3 / 0.8, 0, 0], atol=0.03)


def test_top_p_is_exact_when_the_nucleus_is_larger_than_the_likely_few():
    logits = np.zeros(2000)
    shares = draw(logits, SamplingParams(1.0, top_p=0.5), n=20000)
    assert 900 < np.count_nonzero(shares) <= 1000


def test_the_seed_decides():
    logits = np.zeros(1000, np.float32)[None]
    a, b, c = (make(1, params=SamplingParams(1.0), seed=s) for s in (1, 1, 2))
    texts = [[sample(logits, [s])[0] for _ in range(8)] for s in (a, b, c)]
    assert texts[0] == texts[1] != texts[2]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=600),
    st.floats(1e-3, 10),
    st.floats(1e-6, 1),
)
def test_any_logits_give_a_token_that_exists(logits, temperature, top_p):
    sequence = make(1, params=SamplingParams(temperature, top_p))
    assert 0 <= sample(np.asarray([logits], np.float32), [sequence])[0] < len(logits)
