"""The sampler against a naive one that sorts everything, and the rules that hold for any logits."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgellm_agent.worker.sampler import (
    NO_TOKEN,
    Choice,
    Draw,
    SamplerState,
    SamplingParams,
    distribution,
    sample,
)


def state(params=None, prompt=(), seed=0, answer=()):
    made = SamplerState(params or SamplingParams(), prompt, seed)
    for token in answer:
        made.push(token)
    return made


def rows(*logits):
    return np.asarray(logits, np.float32)


def mask(allowed, vocab):
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def probabilities(logits, draw):
    """What `distribution` says, as one number for each token."""
    ids, weights = distribution(logits, draw)
    dense = np.zeros(len(logits))
    dense[ids] = weights / weights.sum()
    return dense


def naive_scores(logits, params, prompt=(), answer=(), banned=(), allowed=None):
    scores = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] = -np.inf if bias <= -100 else scores[token] + bias
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(answer).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token in range(len(scores)):
        if token in banned or (allowed is not None and token not in allowed):
            scores[token] = -np.inf
    return scores


def naive_probabilities(scores, params):
    """Temperature, top-k, top-p, min-p, each followed by a division by what is left."""

    def left(probabilities, kept):
        dense = np.zeros(len(probabilities))
        dense[kept] = probabilities[kept]
        return dense / dense.sum()

    order = np.argsort(-scores, kind="stable")
    dense = np.exp((scores - scores.max()) / params.temperature)
    dense = left(dense, order[: params.top_k or None])
    if params.top_p < 1:
        dense = left(dense, order[: int(np.searchsorted(np.cumsum(dense[order]), params.top_p)) + 1])
    return left(dense, np.flatnonzero(dense >= params.min_p * dense.max()))


def shares(logits, params, n=4000):
    drawn = state(params)
    counts = np.zeros(len(logits))
    for _ in range(n):
        (choice,) = sample(rows(logits), [Draw(drawn)])
        counts[choice.token] += 1
        drawn.push(choice.token)
    return counts / n


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60).map(rows).map(lambda a: a[0])
ANY_PARAMS = st.builds(
    SamplingParams,
    # The protocol has single precision.
    temperature=st.floats(0, 10, width=32),
    top_p=st.floats(0.05, 1),
    top_k=st.integers(0, 70),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    top_logprobs=st.none() | st.integers(0, 20),
)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        SamplingParams(0.7, top_p=0.9),
        SamplingParams(1.5, top_p=0.95),
        SamplingParams(10.0, top_p=0.999),
        SamplingParams(1e-3, top_p=0.5),
        SamplingParams(1.0, top_k=40),
        SamplingParams(1.0, top_k=3000),
        SamplingParams(1.0, top_k=9999),
        SamplingParams(2.0, min_p=0.02),
        SamplingParams(1.3, top_k=1000, top_p=0.8, min_p=0.01),
        SamplingParams(1.3, top_p=0.99, min_p=0.001),
        SamplingParams(0.9, 0.97, 500, 0.001, 1.3, 0.5, 0.2, {1: 5.0, 2: -7.5, 3: -100.0}),
    ],
    ids=str,
)
def test_probabilities_are_those_of_a_naive_sampler(params):
    rng = np.random.default_rng(1)
    for spread in (0.3, 3.0, 9.0):
        logits = (rng.standard_normal(5000) * spread).astype(np.float32)
        prompt, answer = rng.integers(5000, size=300).tolist(), rng.integers(50, size=200).tolist()
        banned, allowed = (0, 7), set(rng.integers(5000, size=4000).tolist())
        draw = Draw(state(params, prompt, answer=answer), banned, mask(allowed, 5000))
        scores = naive_scores(logits, params, prompt, answer, banned, allowed)
        expected = naive_probabilities(scores, params)
        found = probabilities(logits, draw)
        assert np.array_equal(found > 0, expected > 0)
        assert np.allclose(found, expected, rtol=2e-5, atol=0)


@given(LOGITS, ANY_PARAMS, st.lists(st.integers(0, 59)), st.lists(st.integers(0, 59)))
def test_greedy_takes_the_likeliest_after_bias_and_penalties(logits, params, prompt, answer):
    params = SamplingParams(**{**vars(params), "temperature": 0.0, "logit_bias": {0: 3.0}})
    prompt, answer = ([t for t in tokens if t < len(logits)] for tokens in (prompt, answer))
    (choice,) = sample(logits[None], [Draw(state(params, prompt, answer=answer))])
    scores = naive_scores(logits, params, prompt, answer)
    assert scores[choice.token] == pytest.approx(scores.max(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vocab", [3, 256, 5000])
def test_a_draw_takes_the_token_whose_share_holds_the_seed_s_number(vocab):
    logits = np.random.default_rng(vocab).standard_normal((1, vocab)).astype(np.float32)
    cumulative = np.cumsum(naive_probabilities(logits[0].astype(np.float64), SamplingParams(1.0)))
    expected = np.random.default_rng(7)
    drawn = state(SamplingParams(1.0), seed=7)
    for _ in range(200):
        (choice,) = sample(logits, [Draw(drawn)])
        assert choice.token == np.searchsorted(cumulative, expected.random(), side="right")
        drawn.push(choice.token)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingParams(0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
        (SamplingParams(1.0, top_p=0.7), [0.625, 0.375, 0, 0]),
        (SamplingParams(1.0, top_k=3), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (SamplingParams(1.0, min_p=0.4), [0.625, 0.375, 0, 0]),
        # 0.5 of the two that top-k left is already more than 0.6.
        (SamplingParams(1.0, top_k=2, top_p=0.6), [1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_share_says(params, expected):
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert np.allclose(shares(logits, params), expected, atol=0.03)


def test_the_edges_of_the_random_numbers_give_tokens_that_may_come():
    logits = rows([0, 1, 2, -np.inf])
    for params in (SamplingParams(1.0), SamplingParams(1.0, top_p=0.999), SamplingParams(1.0, top_k=4)):
        for uniform in (0.0, math.nextafter(1.0, 0.0)):
            drawn = state(params)
            drawn.uniform = uniform
            assert sample(logits, [Draw(drawn, banned=[0])])[0].token in {1, 2}


@pytest.mark.parametrize("vocab", [250, 256, 260, 600])
def test_rounding_never_leads_to_a_token_that_may_not_come(vocab):
    drawn = state(SamplingParams(1.0))
    drawn.uniform = math.nextafter(1.0, 0.0)
    allowed = mask(range(245), vocab)
    for seed in range(100):
        logits = np.random.default_rng(seed).standard_normal((1, vocab)).astype(np.float32)
        assert sample(logits, [Draw(drawn, allowed=allowed)])[0].token == 244


def test_the_seed_decides():
    logits = np.zeros((1, 1000), np.float32)

    def text(seed):
        drawn, tokens = state(SamplingParams(1.0), seed=seed), []
        for _ in range(8):
            tokens.append(sample(logits, [Draw(drawn)])[0].token)
            drawn.push(tokens[-1])
        return tokens

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)


def test_a_row_that_is_sampled_again_before_its_token_joins_gives_the_same_again():
    logits = np.zeros((1, 1000), np.float32)
    draw = Draw(state(SamplingParams(1.0)))
    assert len({sample(logits, [draw])[0].token for _ in range(20)}) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(LOGITS, ANY_PARAMS), min_size=1, max_size=6), st.integers(0, 100))
def test_a_row_answers_as_if_it_were_alone(batch, seed):
    logits = np.full((len(batch), 60), -30, np.float32)
    for row, (values, _) in zip(logits, batch, strict=True):
        row[: len(values)] = values
    draws = [Draw(state(params, [1, 2], seed + i, [3])) for i, (_, params) in enumerate(batch)]
    before = logits.copy()
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], [draw])[0] for i, draw in enumerate(draws)]
    assert np.array_equal(logits, before)


@given(LOGITS, ANY_PARAMS, st.integers(0, 100))
def test_top_k_of_one_and_a_tiny_top_p_are_greedy(logits, params, seed):
    greedy = sample(logits[None], [Draw(state())])[0].token
    for narrow in ({"top_k": 1}, {"top_p": 1e-9, "top_k": 0}):
        alone = SamplingParams(temperature=max(params.temperature, 0.1), **narrow)
        token = sample(logits[None], [Draw(state(alone, seed=seed))])[0].token
        assert logits[token] == pytest.approx(logits[greedy], abs=1e-5)


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=400), st.integers(0, 100))
def test_min_p_of_one_leaves_only_ties_with_the_likeliest(logits, seed):
    (choice,) = sample(rows(logits), [Draw(state(SamplingParams(10.0, min_p=1.0), seed=seed))])
    assert logits[choice.token] == max(logits)


@given(LOGITS, ANY_PARAMS, st.sets(st.integers(0, 70)), st.sets(st.integers(0, 59)), st.integers(0, 100))
@example(rows([0.0])[0], SamplingParams(), {0}, {0}, 0)
def test_what_may_not_come_never_comes(logits, params, allowed, banned, seed):
    banned = [token for token in banned if token < len(logits)]
    draw = Draw(state(params, seed=seed), banned, mask(allowed, 71))
    (choice,) = sample(logits[None], [draw])
    left = {token for token in allowed if token < len(logits)} - {*banned}
    assert choice.token in (left or {NO_TOKEN})


def test_tokens_beyond_a_shorter_mask_may_not_come():
    logits = np.arange(100, dtype=np.float32)[None]
    assert sample(logits, [Draw(state(), allowed=mask([1, 40], 64))])[0].token == 40


@pytest.mark.parametrize("temperature", [0.0, 10.0])
def test_a_bias_of_minus_100_bans_at_any_temperature(temperature):
    biased = Draw(state(SamplingParams(temperature, logit_bias={0: -100.0, 1: -99.0})))
    assert sample(rows([90, 5, -np.inf]), [biased])[0].token == 1
    assert sample(rows([90, -np.inf, -np.inf]), [biased])[0].token == NO_TOKEN


def test_penalties_say_what_their_names_say():
    logits = rows([2.0, 2.0, -2.0, -2.0, 0.5])

    def scores(answer, prompt=(), **penalties):
        ids, weights = distribution(
            logits[0], Draw(state(SamplingParams(1.0, **penalties), prompt, 0, answer))
        )
        return np.log(weights[np.argsort(ids)] / weights[ids == 4]) + 0.5

    # Repetition sees the prompt too, and makes both signs less likely.
    assert np.allclose(scores([0], [2], repetition_penalty=2.0), [1, 2, -4, -2, 0.5])
    # The others see the answer alone: presence counts once, frequency each time.
    assert np.allclose(scores([0, 0, 2], [1], presence_penalty=0.5), [1.5, 2, -2.5, -2, 0.5])
    assert np.allclose(scores([0, 0, 2], [1], frequency_penalty=0.5), [1, 2, -2.5, -2, 0.5])
    assert np.allclose(scores([0] * 100, frequency_penalty=-2.0), [202, 2, -2, -2, 0.5])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_near_zero_stays_finite(temperature):
    params = SamplingParams(temperature, repetition_penalty=1e-45)
    assert sample(rows([1, 2, 3]), [Draw(state(params, prompt=[1]))])[0].token == 1


@given(st.lists(st.integers(0, 500), max_size=100), st.lists(st.integers(0, 500), max_size=300))
@settings(deadline=None)
def test_counts_are_kept_for_any_number_of_tokens(prompt, answer):
    params = SamplingParams(1.0, repetition_penalty=1.5, frequency_penalty=0.5)
    logits = np.linspace(-5, 5, 501, dtype=np.float32)
    found = probabilities(logits, Draw(state(params, prompt, answer=answer)))
    expected = naive_probabilities(naive_scores(logits, params, prompt, answer), params)
    assert np.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_row_gives_no_token_and_the_others_are_answered(broken, temperature):
    logits = rows([0, 9, 1], [5, broken, 1], [-np.inf] * 3, [3, -np.inf, 1])
    params = SamplingParams(temperature, top_k=1, top_logprobs=1)
    choices = sample(logits, [Draw(state(params)) for _ in logits])
    assert [choice.token for choice in choices] == [1, NO_TOKEN, NO_TOKEN, 0]
    assert choices[1] == Choice(NO_TOKEN)


def test_log_probabilities_are_the_model_s_own():
    logits = np.log(rows([0.5, 0.3, 0.2]))
    params = SamplingParams(0.1, repetition_penalty=3.0, logit_bias={0: -100.0}, top_logprobs=2)
    (choice,) = sample(logits, [Draw(state(params, [1], 0, [1]), allowed=mask([1], 3))])
    assert (choice.token, [token for token, _ in choice.top]) == (1, [0, 1])
    assert choice.logprob == pytest.approx(math.log(0.3))
    assert [logprob for _, logprob in choice.top] == pytest.approx([math.log(0.5), math.log(0.3)])


def test_log_probabilities_come_only_when_asked_for():
    logits = rows([0, 1])
    assert sample(logits, [Draw(state())]) == [Choice(1)]
    (choice,) = sample(logits, [Draw(state(SamplingParams(top_logprobs=0)))])
    assert (choice.logprob, choice.top) == (pytest.approx(-math.log1p(math.exp(-1))), ())


def test_what_the_model_rules_out_is_no_alternative():
    logits = np.full((1, 100), -np.inf, np.float32)
    logits[0, [7, 60]] = 0, 1
    (choice,) = sample(logits, [Draw(state(SamplingParams(top_logprobs=5)))])
    assert [token for token, _ in choice.top] == [60, 7]


@given(LOGITS, st.integers(0, 20))
def test_the_likeliest_alternatives_come_first_and_are_chances(logits, top):
    (choice,) = sample(logits[None], [Draw(state(SamplingParams(top_logprobs=top)))])
    found = [logprob for _, logprob in choice.top]
    assert len(found) == min(top, len(logits))
    assert found == sorted(found, reverse=True)
    assert sum(map(math.exp, found)) <= 1 + 1e-9
    assert choice.logprob <= 0
    assert not top or choice.top[0] == (choice.token, choice.logprob)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=600),
    st.floats(1e-3, 10),
    st.floats(1e-6, 1),
)
def test_any_logits_give_a_token_that_exists(logits, temperature, top_p):
    (choice,) = sample(rows(logits), [Draw(state(SamplingParams(temperature, top_p)))])
    assert 0 <= choice.token < len(logits)
