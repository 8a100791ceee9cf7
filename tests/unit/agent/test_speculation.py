import itertools

from hypothesis import given
from hypothesis import strategies as st

from edgellm_agent.worker.speculation import PromptLookup, StepTimes


def test_what_followed_the_last_tokens_before_is_proposed_again():
    assert PromptLookup().propose([5, 6, 7, 8, 9, 10, 1, 5, 6, 7], 3) == [8, 9, 10]


def test_the_latest_occurrence_counts():
    assert PromptLookup().propose([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]


def test_a_longer_match_counts_more_than_a_later_one():
    assert PromptLookup().propose([1, 2, 3, 4, 9, 3, 4, 8, 1, 2, 3, 4], 1) == [9]


@given(st.lists(st.integers(0, 2**17), max_size=80), st.integers(0, 8))
def test_every_proposal_is_a_piece_of_the_text(tokens, longest):
    proposal = PromptLookup().propose(tokens, longest)
    assert len(proposal) <= longest
    assert not proposal or proposal in [tokens[i : i + len(proposal)] for i in range(len(tokens))]


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60))
def test_tokens_that_come_one_by_one_give_the_same_proposal(tokens):
    gradual = PromptLookup()
    for i in range(1, len(tokens)):
        gradual.propose(tokens[:i], 4)
    assert gradual.propose(tokens, 4) == PromptLookup().propose(tokens, 4)


def test_guesses_that_do_not_pay_are_made_ever_more_rarely_and_again_when_they_do():
    lookup, text = PromptLookup(), [1, 2, 3] * 200
    made = []
    for length in range(6, 600):
        if lookup.propose(text[:length], 3):
            made.append(length)
            lookup.observe(length, drafted=3, accepted=0, paid=False)
    gaps = [b - a for a, b in itertools.pairwise(made)]
    assert gaps == sorted(gaps)
    assert max(gaps) == 256
    while not lookup.propose(text + text, 3):
        lookup.observe(10_000, drafted=3, accepted=3, paid=True)
    lookup.observe(1200, drafted=3, accepted=3, paid=True)
    assert lookup.propose(text + text + [1], 3)


def test_a_wider_step_pays_if_it_brings_more_tokens_than_plain_steps_of_its_time():
    times = StepTimes()
    times.observe(1, 1, 0.010)
    times.observe(1, 4, 0.020)
    assert not times.worth(1, 4, 2)
    assert times.worth(1, 4, 3)


def test_a_shape_that_was_slow_once_is_tried_again():
    times = StepTimes()
    times.observe(4, 1, 0.010)
    times.observe(4, 4, 1.0)
    assert sum(not times.worth(4, 4, 12) for _ in range(5000)) < 3000
