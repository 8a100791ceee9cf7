"""The load generator sends what it was told, when it was told, and always ends; time here is virtual."""

from __future__ import annotations

import asyncio
import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench import (
    Bounds,
    IteratorTarget,
    Piece,
    Point,
    PromptSource,
    Request,
    Sweep,
    Usage,
    WordFit,
    arrival_times,
    ask,
    chat,
    closed_loop,
    fit_words,
    interference,
    load,
    open_loop,
    summarize,
)
from edgellm.client import Message
from edgellm.errors import DeviceUnreachableError, EdgellmError, RemoteError
from tests.support import virtual_time
from tests.support.scripted_target import ScriptedTarget

FIT = WordFit(tokens_per_word=1.0, overhead_tokens=0.0)


def sender(target, tokens=3):
    async def send(number, due_s):
        return await ask(target, Request(f"prompt {number}", tokens), due_s)

    return send


def closed(target, users, bounds, tokens=3):
    return virtual_time.run(_in_loop(lambda stop: closed_loop(sender(target, tokens), users, bounds, stop)))


def opened(target, due, tokens=3):
    return virtual_time.run(_in_loop(lambda stop: open_loop(sender(target, tokens), due, stop)))


async def _in_loop(work, stop_after_s=None):
    stop = asyncio.Event()
    if stop_after_s is not None:
        asyncio.get_running_loop().call_later(stop_after_s, stop.set)
    return await work(stop)


def test_a_record_has_the_moments_of_the_tokens():
    record = virtual_time.run(ask(ScriptedTarget(ttft_s=0.5, tpot_s=0.1), Request("x", 3)))
    assert [arrival.at_s for arrival in record.arrivals] == pytest.approx([0.5, 0.6, 0.7])
    assert (record.text, record.output_tokens, record.error) == ("abb", 3, None)


@pytest.mark.parametrize(("users", "requests"), [(1, 5), (4, 9), (8, 3)])
def test_a_closed_loop_keeps_its_users_busy_and_sends_exactly_so_many(users, requests):
    target = ScriptedTarget()
    outcome = closed(target, users, Bounds(requests))
    assert len(outcome.records) == len(target.requests) == requests
    assert target.most_running == min(users, requests)
    rounds = -(-requests // users)
    assert max(record.ended_s for record in outcome.records) == pytest.approx(rounds * 0.7)


def test_after_its_duration_no_request_starts_and_the_running_ones_end():
    outcome = closed(ScriptedTarget(), 2, Bounds(duration_s=1.0))
    assert [record.began_s for record in outcome.records] == pytest.approx([0, 0, 0.7, 0.7])
    assert all(record.output_tokens == 3 for record in outcome.records)


def test_a_run_without_any_bound_is_refused():
    with pytest.raises(ValueError, match="number of requests or a duration"):
        Bounds()


def test_an_open_loop_sends_when_due_although_earlier_ones_run():
    target = ScriptedTarget(ttft_s=10)
    outcome = opened(target, [0.0, 1.0, 2.5])
    assert [record.began_s for record in outcome.records] == pytest.approx([0, 1, 2.5])
    assert target.most_running == 3


def test_an_overloaded_open_loop_counts_what_it_could_not_send(monkeypatch):
    monkeypatch.setattr(load, "MOST_IN_FLIGHT", 2)
    # The first two have ended when the last is due.
    outcome = opened(ScriptedTarget(ttft_s=100), [0.0, 1.0, 2.0, 3.0, 200.0])
    metrics = summarize(outcome.records)
    assert (metrics.requests, metrics.errors) == (3, {"NOT_SENT": 2})


@given(st.floats(0.1, 50), st.integers(1, 200), st.floats(0.5, 20), st.integers(0, 9))
def test_arrivals_rise_end_in_time_and_repeat_with_their_seed(rate, requests, duration, seed):
    bounds = Bounds(requests, duration)
    times = arrival_times(rate, bounds, seed)
    assert times == sorted(times) == arrival_times(rate, bounds, seed)
    assert len(times) <= requests
    assert all(0 <= at < duration for at in times)


def test_arrivals_come_at_their_rate_and_at_random():
    times = arrival_times(5.0, Bounds(4000), seed=1)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.05)
    # Of a Poisson process, the gaps' standard deviation is their mean.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)


def test_a_stop_keeps_what_was_measured_and_cancels_the_rest():
    target = ScriptedTarget()
    work = functools.partial(closed_loop, sender(target), 2, Bounds(100))
    outcome = virtual_time.run(_in_loop(work, stop_after_s=1.0))
    assert (len(outcome.records), outcome.unfinished, target.running) == (2, 2, 0)


def test_a_failure_is_recorded_and_the_others_go_on():
    target = ScriptedTarget(failure=lambda n: RemoteError("no", code="INTERNAL") if n == 1 else None)
    outcome = closed(target, 1, Bounds(4))
    assert [record.error and record.error.code for record in outcome.records] == [
        None,
        "INTERNAL",
        None,
        None,
    ]


def test_a_user_comes_back_when_the_device_says():
    refusal = RemoteError("busy", code="UNAVAILABLE", retry_after_s=2.0)
    outcome = closed(ScriptedTarget(failure=lambda n: refusal if n == 0 else None), 1, Bounds(2))
    assert [record.began_s for record in outcome.records] == pytest.approx([0, 2])


def test_a_target_that_refuses_everything_ends_the_run():
    target = ScriptedTarget(failure=lambda _: RemoteError("no", code="INTERNAL"))
    outcome = closed(target, 1, Bounds(duration_s=1e6))
    assert len(outcome.records) == load.MOST_FAILURES


def test_a_target_that_is_gone_ends_the_run_and_leaves_what_was_measured():
    gone = DeviceUnreachableError("gone")
    outcome = closed(ScriptedTarget(failure=lambda n: gone if n == 3 else None), 2, Bounds(100))
    assert outcome.lost is gone
    assert len(outcome.records) == 2


def test_a_fault_of_the_target_s_own_code_is_not_taken_for_a_measurement():
    async def send(number, due_s):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        virtual_time.run(_in_loop(lambda stop: closed_loop(send, 2, Bounds(4), stop)))


@given(st.integers(0, 1000), st.integers(1, 400), st.integers(0, 400))
def test_prompts_repeat_with_their_number_and_share_only_what_they_should(seed, tokens, shared):
    source = PromptSource(seed, FIT)
    shared = min(shared, tokens)
    first, second = (source.prompt(number, tokens, shared).split() for number in (1, 2))
    assert first == source.prompt(1, tokens, shared).split()
    assert len(first) == len(second) == tokens
    assert first[:shared] == second[:shared]
    # By chance two texts may have some first words in common, but not eight.
    assert tokens - shared < 8 or first[shared : shared + 8] != second[shared : shared + 8]


@given(st.floats(0.5, 8), st.integers(0, 40), st.integers(60, 2000))
def test_a_fit_gives_prompts_of_the_wanted_length(tokens_per_word, overhead, wanted):
    def count(request):
        return round(overhead + tokens_per_word * len(request.prompt.split()))

    fit = virtual_time.run(fit_words(ScriptedTarget(count_tokens=count), 0, 256))
    prompt = PromptSource(0, fit).prompt(0, wanted)
    # Half a word cannot be sent, and the two counts of the fit were rounded.
    assert abs(count(Request(prompt, 1)) - wanted) <= tokens_per_word / 2 + 1 + wanted / 248


def test_a_target_that_does_not_count_the_prompt_cannot_be_fitted():
    with pytest.raises(EdgellmError, match="how many tokens a prompt has"):
        virtual_time.run(fit_words(ScriptedTarget(count_tokens=lambda _: None), 0))


def test_a_target_that_counts_every_prompt_alike_cannot_be_fitted():
    with pytest.raises(EdgellmError, match="counts 7 tokens for 8 words and 7 for 40"):
        virtual_time.run(fit_words(ScriptedTarget(count_tokens=lambda _: 7), 0))


def measure(target, point, stop_after_s=None):
    source = PromptSource(3, FIT)
    return virtual_time.run(_in_loop(lambda stop: Sweep(target, source, stop).measure(point), stop_after_s))


def test_warm_up_requests_go_first_and_do_not_count():
    target = ScriptedTarget()
    row = measure(target, Point(10, 3, concurrency=2, rate=None, bounds=Bounds(4), warmup=2))
    assert (len(target.requests), row.metrics.requests) == (6, 4)
    assert min(record.began_s for record in row.records) == pytest.approx(0.7)
    assert len({request.prompt for request in target.requests}) == 6


def test_what_ends_during_warm_up_has_measured_nothing():
    point = Point(10, 3, concurrency=1, rate=None, bounds=Bounds(4), warmup=2)
    stopped = measure(ScriptedTarget(), point, stop_after_s=1.0)
    assert (stopped.records, stopped.lost) == ([], None)
    gone = DeviceUnreachableError("gone")
    target = ScriptedTarget(failure=lambda n: gone if n == 1 else None)
    lost = measure(target, point)
    assert (lost.records, lost.lost, len(target.requests)) == ([], gone, 2)


def test_a_sweep_can_send_by_the_clock():
    row = measure(ScriptedTarget(), Point(10, 3, concurrency=None, rate=2.0, bounds=Bounds(5)))
    assert [record.began_s for record in row.records] == pytest.approx(arrival_times(2.0, Bounds(5), 3))


def hold_chat(target, **options):
    options = {
        "conversations": 2,
        "concurrency": 1,
        "turns": 3,
        "input_tokens": 5,
        "output_tokens": 4,
    } | options
    return virtual_time.run(_in_loop(lambda stop: chat(target, PromptSource(0, FIT), stop, **options)))


def test_each_turn_of_a_chat_extends_the_one_before_with_its_answer():
    target = ScriptedTarget()
    result = hold_chat(target)
    first, second, third, other, *_ = [request.prompt for request in target.requests]
    assert second[:2] == (*first, Message("assistant", "abbb"))
    assert third[:4] == (*second, Message("assistant", "abbb"))
    assert other[0] != first[0]
    assert [(turn.turn, turn.metrics.requests) for turn in result.turns] == [(1, 2), (2, 2), (3, 2)]


def test_a_failed_turn_ends_its_conversation_and_is_counted():
    target = ScriptedTarget(failure=lambda n: RemoteError("x", code="INTERNAL") if n == 1 else None)
    result = hold_chat(target)
    assert [turn.metrics.errors for turn in result.turns] == [{}, {"INTERNAL": 1}, {}]
    assert [turn.metrics.requests for turn in result.turns] == [2, 1, 1]


class OneEngine(ScriptedTarget):
    """Prompts take 10 ms a word and hold up everybody's tokens, as an engine without chunks would.

    After a prompt its own first token comes first, and 20 ms later those that it held up.
    """

    def __init__(self):
        super().__init__()
        self.engine = asyncio.Lock()

    async def generate(self, request):
        async with self.engine:
            await asyncio.sleep(0.01 * len(request.prompt.split()))
        for number in range(request.output_tokens):
            if number:
                await asyncio.sleep(0.05)
                if self.engine.locked():
                    async with self.engine:
                        pass
                    await asyncio.sleep(0.02)
            yield Piece(1)
        yield Piece(0, usage=Usage(len(request.prompt.split()), request.output_tokens))


def disturb(stream_tokens):
    options = {"streams": 2, "rounds": 3, "stream_tokens": stream_tokens, "newcomer_tokens": 200}

    async def work(stop):
        return await interference(OneEngine(), PromptSource(0, FIT), stop, **options)

    return virtual_time.run(_in_loop(work))


def test_interference_tells_calm_gaps_from_those_beside_a_long_prompt():
    result = disturb(stream_tokens=500)
    assert (result.rounds, result.avg_input_tokens) == (3, 200)
    assert result.calm_inter_token_latency_ms.maximum == pytest.approx(50)
    assert 2020 <= round(result.during_inter_token_latency_ms.maximum) <= 2070
    assert result.alone_time_to_first_token_ms.p50 == pytest.approx(2000)
    assert result.beside_time_to_first_token_ms.p50 >= 2000


def test_answers_that_end_before_the_newcomer_s_first_token_are_an_error():
    with pytest.raises(EdgellmError, match="over before the newcomer") as error:
        disturb(stream_tokens=18)
    assert error.value.hint == "raise --output-tokens"


def test_a_blocking_runtime_in_this_process_is_a_target_too():
    def generate(request):
        yield from (Piece(1, letter) for letter in "xyz"[: request.output_tokens])
        yield Piece(0, usage=Usage(prompt_tokens=1))

    async def main():
        target = IteratorTarget(generate)
        try:
            return await closed_loop(sender(target), 3, Bounds(6), asyncio.Event())
        finally:
            target.close()

    outcome = asyncio.run(main())
    assert [record.text for record in outcome.records] == ["xyz"] * 6
    assert {record.usage.prompt_tokens for record in outcome.records} == {1}
