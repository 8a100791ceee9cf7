"""The memory plan never promises what is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import DoesNotFitError
from edgellm.memory import (
    MINIMAL_CONTEXT_TOKENS,
    TEMPLATE_BYTES,
    VERIFIED_TOKENS,
    WORKER_BYTES,
    MemoryPlan,
    largest_context,
    needed_bytes,
    plan_memory,
    workspace_bytes,
)
from tests.support.tiny_bundle import make_config

CONFIG = make_config()
MIB = 1 << 20
PAGE_TOKENS = 4096 // (CONFIG.model.head_dim * 4)

# In kibibytes: over wider ranges Hypothesis prefers small numbers, and nearly all plans would be refused.
available = st.integers(0, 48 << 10).map(lambda kib: kib << 10)
headroom = st.integers(0, 16 << 10).map(lambda kib: kib << 10)
contexts = st.none() | st.integers(1, 3000)
sequences = st.integers(1, 64)
prefills = st.integers(1, 2048)


def used_bytes(plan: MemoryPlan) -> int:
    return plan.weights_bytes + plan.workspace_bytes + plan.headroom_bytes + plan.kv_bytes


def plan_or_refusal(available_bytes: int, **asked: object) -> MemoryPlan | DoesNotFitError:
    try:
        return plan_memory(CONFIG, available_bytes=available_bytes, **asked)
    except DoesNotFitError as error:
        return error


@given(available, headroom, contexts, sequences, prefills)
def test_a_plan_fits_and_holds_one_whole_sequence_or_is_refused_with_figures(
    total, spare, context, many, prefill
):
    asked = {
        "headroom_bytes": spare,
        "context_tokens": context,
        "max_sequences": many,
        "prefill_tokens": prefill,
    }
    plan = plan_or_refusal(total, **asked)
    if isinstance(plan, DoesNotFitError):
        assert plan.available_bytes == total < plan.needed_bytes
        # The figure is exact: with it the plan fits, with one byte less it does not.
        fitting = plan_or_refusal(plan.needed_bytes, **asked)
        assert isinstance(fitting, MemoryPlan)
        assert fitting.context_tokens == min(context or MINIMAL_CONTEXT_TOKENS, MINIMAL_CONTEXT_TOKENS)
        assert isinstance(plan_or_refusal(plan.needed_bytes - 1, **asked), DoesNotFitError)
        return
    # Whole pages: a sequence of the whole context fits as the cache counts it.
    longest_bytes = -(-plan.context_tokens // PAGE_TOKENS) * PAGE_TOKENS * plan.kv_bytes_per_token
    usable_kv_bytes = longest_bytes * many
    assert used_bytes(plan) <= total
    assert longest_bytes <= plan.kv_bytes <= usable_kv_bytes
    assert used_bytes(plan) == total or plan.kv_bytes == usable_kv_bytes
    assert plan.context_tokens <= min(context or CONFIG.model.context_length, CONFIG.model.context_length)
    assert plan.workspace_bytes == workspace_bytes(
        CONFIG,
        step_tokens=max(many, prefill),
        context_tokens=plan.context_tokens,
        max_sequences=many,
    )
    more = plan_or_refusal(total + 1, **asked)
    assert isinstance(more, MemoryPlan)
    assert more.context_tokens >= plan.context_tokens


@given(available, headroom, contexts, sequences)
def test_less_headroom_never_shortens_the_context(total, spare, context, many):
    def context_of(headroom_bytes: int) -> int:
        plan = plan_or_refusal(
            total, headroom_bytes=headroom_bytes, context_tokens=context, max_sequences=many
        )
        return plan.context_tokens if isinstance(plan, MemoryPlan) else 0

    assert context_of(spare // 2) >= context_of(spare)


@given(available, headroom, sequences, prefills)
def test_the_largest_context_is_granted_to_all_sequences_and_one_page_more_is_not(
    total, spare, many, prefill
):
    shared = {"headroom_bytes": spare, "max_sequences": many, "prefill_tokens": prefill}
    largest = largest_context(CONFIG, available_bytes=total, **shared)
    assert 0 <= largest <= CONFIG.model.context_length
    if largest:
        assert needed_bytes(CONFIG, context_tokens=largest, **shared) <= total
        plan = plan_memory(CONFIG, available_bytes=total, context_tokens=largest, **shared)
        assert plan.context_tokens == largest
        held_tokens = -(-largest // PAGE_TOKENS) * PAGE_TOKENS
        assert plan.kv_bytes == many * held_tokens * CONFIG.kv_bytes_per_token
    if largest < CONFIG.model.context_length:
        assert needed_bytes(CONFIG, context_tokens=largest + 1, **shared) > total


@given(headroom, st.integers(1, CONFIG.model.context_length), sequences, prefills)
def test_what_is_needed_is_enough_and_nothing_less_is(spare, context, many, prefill):
    shared = {"headroom_bytes": spare, "max_sequences": many, "prefill_tokens": prefill}
    needed = needed_bytes(CONFIG, context_tokens=context, **shared)
    assert largest_context(CONFIG, available_bytes=needed, **shared) >= context
    assert largest_context(CONFIG, available_bytes=needed - 1, **shared) < context


def test_plenty_of_memory_gives_what_was_asked_for_and_no_more():
    plan = plan_memory(
        CONFIG,
        available_bytes=1 << 40,
        headroom_bytes=0,
        context_tokens=1000,
        max_sequences=3,
        prefill_tokens=64,
    )
    assert (plan.context_tokens, plan.max_sequences) == (1000, 3)
    assert plan.kv_bytes == 3 * 1024 * CONFIG.kv_bytes_per_token == 3 * 1024 * 2 * 2 * 2 * 16 * 4
    logits_bytes = VERIFIED_TOKENS * CONFIG.model.vocab_size * 4 + CONFIG.model.vocab_size * 384
    assert (
        plan.workspace_bytes
        == WORKER_BYTES + TEMPLATE_BYTES + MIB + 64 * 1024 + 4 * 64 * 1000 * 4 + logits_bytes
    )


def test_a_plan_survives_the_wire():
    plan = plan_memory(CONFIG, available_bytes=100 * MIB, headroom_bytes=MIB, max_sequences=4)
    assert (
        MemoryPlan.from_proto(type(plan.to_proto()).FromString(plan.to_proto().SerializeToString())) == plan
    )


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"prefill_tokens": 0}, {"context_tokens": 0}])
def test_senseless_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        plan_memory(CONFIG, available_bytes=MIB, headroom_bytes=0, **wrong)
