"""The canary's rule: the first other token decides, and only a clear choice must be kept."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bundle.config import Canary
from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent.engine.canary import Choice, compare, try_engine
from edgellm_agent.errors import BusyError, DeadlineError, EngineError, InvalidError, UnavailableError
from tests.support.tiny_bundle import make_config

CANARY = Canary(prompt="1, 2,", token_ids=(5, 6, 7, 8), gaps=(3.0, 0.7, 2.0, 1.0), tolerance=1.0)
WITHOUT, WITH = make_config(), make_config(canary=CANARY)


def delta(tokens, gaps):
    """Tokens as a worker tells them, with the likeliest two logits so far apart."""
    chance = inference_pb2.TokenChance
    return worker_pb2.Delta(
        token_ids=tokens,
        logprobs=[
            inference_pb2.TokenLogprob(
                token=chance(id=token), top=[chance(id=token, logprob=-0.1), chance(logprob=-0.1 - gap)]
            )
            for token, gap in zip(tokens, gaps, strict=False)
        ],
    )


class ScriptedEngine:
    """Answers every request with these tokens, and then fails with the error, if there is one."""

    def __init__(self, *tokens, gaps=CANARY.gaps, error=None):
        self.tokens, self.gaps, self.error = tokens, gaps, error
        self.request, self.closed = None, False

    def submit(self, request, deadline_s=0):
        self.request = request
        return self

    async def __aiter__(self):
        # As they come: one, and then several together.
        yield delta(self.tokens[:1], self.gaps)
        yield delta(self.tokens[1:], self.gaps[1:])
        if self.error is not None:
            raise self.error

    async def aclose(self):
        self.closed = True


class HungEngine(ScriptedEngine):
    """Takes a request and never answers, as a worker in a loop of its own would."""

    async def __aiter__(self):
        await asyncio.Event().wait()
        yield worker_pb2.Delta()


async def test_an_engine_that_hangs_fails_its_canary_and_is_cancelled():
    engine = HungEngine()
    with pytest.raises(EngineError, match="did not answer"):
        await asyncio.wait_for(try_engine(engine, WITH, deadline_s=0.05), 5)
    assert engine.closed


async def test_the_canarys_prompt_is_asked_greedily_past_any_end_token():
    engine = ScriptedEngine(5, 6, 7, 8)
    await try_engine(engine, WITH)
    request = engine.request
    assert (request.prompt, request.max_tokens, request.ignore_eos) == ("1, 2,", 4, True)
    assert request.sampling.temperature == 0
    assert engine.closed


async def test_without_a_canary_any_answer_of_the_length_asked_for_does():
    await try_engine(ScriptedEngine(9, 9, 9, 9), WITHOUT)
    with pytest.raises(EngineError, match="gave 3 of 4 tokens"):
        await try_engine(ScriptedEngine(9, 9, 9), WITHOUT)


async def test_another_token_where_the_choice_was_clear_refuses_the_engine_with_step_expected_and_got():
    with pytest.raises(EngineError, match=r"at step 2 .* gave token 9 and not 7"):
        await try_engine(ScriptedEngine(5, 6, 9, 8), WITH)


async def test_an_answer_that_ends_early_refuses_the_engine_although_its_tokens_are_right():
    with pytest.raises(EngineError, match="gave 2 of 4 tokens"):
        await try_engine(ScriptedEngine(5, 6), WITH)


@pytest.mark.parametrize(
    "error", [UnavailableError("dead"), DeadlineError("late"), InvalidError("prompt", "x")]
)
async def test_an_engine_that_fails_its_canary_is_refused_whatever_the_failure(error):
    with pytest.raises(EngineError, match="failed its first request"):
        await try_engine(ScriptedEngine(5, error=error), WITH)


async def test_an_engine_that_is_busy_has_not_failed():
    with pytest.raises(BusyError):
        await try_engine(ScriptedEngine(5, error=BusyError("full")), WITH)


async def test_a_gap_that_moved_by_more_than_two_tolerances_refuses_an_engine_whose_tokens_are_right():
    await try_engine(ScriptedEngine(5, 6, 7, 8, gaps=(4.9, 2.6, 0.1, 2.9)), WITH)
    for moved in [(5.1, 0.7, 2.0, 1.0), (3.0, 0.7, 2.0, 3.1), (3.0, float("nan"), 2.0, 1.0)]:
        with pytest.raises(EngineError, match="the gap of token"):
            await try_engine(ScriptedEngine(5, 6, 7, 8, gaps=moved), WITH)


def chosen(*tokens):
    return [Choice(token, gap) for token, gap in zip(tokens, CANARY.gaps, strict=True)]


def test_a_divergence_where_the_choice_was_unclear_is_allowed_and_ends_the_comparison():
    compare(CANARY, [Choice(5, 3.0), Choice(99, 0.1), Choice(99, 50.0), Choice(99, 50.0)])


def test_a_gap_that_equals_the_tolerance_is_clear():
    with pytest.raises(EngineError):
        compare(CANARY, chosen(5, 6, 7, 99))


@st.composite
def canaries_and_answers(draw):
    steps = draw(st.integers(1, 12))
    several = st.lists(st.integers(0, 2), min_size=steps, max_size=steps)
    gaps = draw(st.lists(st.floats(0, 3), min_size=steps, max_size=steps))
    canary = Canary(prompt="x", token_ids=draw(several), gaps=gaps, tolerance=1.0)
    return canary, draw(several)


@given(canaries_and_answers())
def test_an_answer_passes_exactly_if_its_first_divergence_is_where_the_gap_is_below_the_tolerance(drawn):
    canary, answer = drawn
    clear_there = [
        gap >= canary.tolerance
        for gap, expected, got in zip(canary.gaps, canary.token_ids, answer, strict=True)
        if expected != got
    ][:1]
    choices = [Choice(token, gap) for token, gap in zip(answer, canary.gaps, strict=True)]
    if clear_there == [True]:
        with pytest.raises(EngineError):
            compare(canary, choices)
    else:
        compare(canary, choices)
