"""What the worker's loop does with many requests, one rule at a time."""

import pytest

from edgellm.v1 import worker_pb2
from tests.unit.agent.engine import PAGE_BYTES, PLAN, SEQUENCES, Engine
from tests.unit.agent.hash_model import alone


@pytest.fixture(params=[False, True], ids=["one long row", "several long rows"])
def engine(request):
    made = Engine(several=request.param)
    yield made
    made.pool.close()


def test_each_text_agrees_with_its_text_alone_whatever_runs_beside_it(engine):
    for i in range(10):
        engine.submit([*range(i % 3, 40 + i % 3), i], 30 + i)
    engine.finish()
    for request in engine.prompts:
        engine.check(request)


def test_memory_that_runs_out_costs_time_and_no_text():
    engine = Engine(pages=14)
    for i in range(4):
        engine.submit([i, *range(20)], 120)
    engine.finish()
    for request in engine.prompts:
        engine.check(request)
    assert engine.scheduler.preemptions_total > 0
    assert sum(e.finished.usage.recomputed_tokens for e in engine.ended.values()) > 0


def test_a_prompt_that_was_just_answered_is_not_computed_again(engine):
    prompt = list(range(60)) + list(range(100))
    engine.submit(prompt, 4)
    engine.finish()
    before = engine.runner.tokens
    second = engine.submit([*prompt, *alone(prompt, 4)[:2], 9], 1)
    engine.finish()
    assert engine.ended[second].finished.usage.cached_tokens == len(prompt) + 2
    assert engine.runner.tokens - before == 1


def test_a_text_that_repeats_itself_takes_fewer_steps_than_tokens(engine):
    engine.submit([1, 2, 3, 1, 2, 3], 150)
    engine.finish()
    assert engine.ended[1].finished.usage.accepted_draft_tokens > 20
    assert engine.runner.steps < 130


def test_a_greedy_client_makes_way_for_one_that_has_nothing(engine):
    for _ in range(12):
        engine.submit(range(30), 100, client="greedy")
    for _ in range(20):
        engine.turn()
    modest = engine.submit([5, 6, 7], 5, client="modest")
    for _ in range(20):
        engine.turn()
    assert modest in engine.ended
    engine.finish()
    for request in engine.prompts:
        engine.check(request)


def test_a_full_queue_refuses_the_last_of_the_client_that_waits_with_most():
    engine = Engine(max_waiting=3)
    greedy = [engine.submit(range(30), 100, client="greedy") for _ in range(SEQUENCES + 3)]
    engine.turn()
    modest = engine.submit([5, 6, 7], 5, client="modest")
    last = engine.submit([5, 6, 7], 5, client="greedy")
    engine.turn()
    refused = {r for r in engine.ended if engine.reason(r) == "BUSY"}
    assert len(refused) == 2
    assert modest not in refused
    assert refused <= {*greedy, last}
    engine.finish()


def test_a_reader_that_takes_nothing_gets_no_more_than_its_credit_and_holds_nobody_up(engine):
    slow = engine.submit(range(20), 100, credit=10)
    quick = engine.submit(range(20, 40), 100)
    while quick not in engine.ended:
        engine.turn()
    assert len(engine.answers[slow]) == 10
    engine.read(slow, 1000)
    engine.finish()
    engine.check(slow)


def test_a_cancelled_request_frees_its_memory_within_a_step(engine):
    request = engine.submit(range(40), 100)
    for _ in range(8):
        engine.turn()
    engine.send(cancel=worker_pb2.Cancel(id=request))
    engine.turn()
    stats = engine.pool.stats()
    assert stats.promised_bytes == 0
    assert stats.used_bytes == stats.cached_bytes
    assert engine.reason(request) == "CANCELLED"


def test_running_streams_wait_for_a_long_prompt_no_longer_than_the_budget():
    engine = Engine(speculate=False)
    engine.submit([1], 150)
    for _ in range(10):
        engine.turn()
    engine.submit(range(150), 10)
    longest, last = 0.0, engine.clock()
    seen = len(engine.answers[1])
    while 1 not in engine.ended:
        engine.turn()
        if len(engine.answers[1]) > seen:
            longest = max(longest, engine.clock() - last)
            seen, last = len(engine.answers[1]), engine.clock()
    assert 0.010 < longest <= 0.030 + 0.007  # the budget, and two steps of its own


def test_a_bound_that_shrinks_ends_what_can_no_longer_fit_and_keeps_the_rest(engine):
    large = engine.submit(range(150), 20)
    small = engine.submit(range(200, 220), 20)
    for _ in range(12):
        engine.turn()
    engine.send(set_limits=worker_pb2.SetLimits(kv_bytes=4 * PAGE_BYTES, max_sequences=SEQUENCES))
    engine.finish()
    assert engine.pool.stats().used_bytes <= 4 * PAGE_BYTES
    assert engine.reason(large) == "BUSY"
    engine.check(small)


def test_deadlines_end_running_and_waiting_requests_alike(engine):
    requests = [engine.submit(range(30), 150, deadline=engine.clock() + 0.5) for _ in range(8)]
    for _ in range(30):
        engine.turn()
    engine.clock.now += 1
    engine.turn()
    assert all(engine.reason(r) == "DEADLINE" for r in requests if not engine.ended[r].HasField("finished"))
    assert len(engine.ended) == 8


def test_readers_that_take_nothing_make_way_for_those_that_do():
    engine = Engine()
    stalled = [engine.submit([i, *range(20)], 50, credit=2, client=f"slow {i}") for i in range(SEQUENCES)]
    for _ in range(40):
        engine.turn()
    newcomer = engine.submit(range(30), 20, client="quick")
    for _ in range(60):
        engine.turn()
    assert newcomer in engine.ended
    for request in stalled:
        assert len(engine.answers[request]) == 2
        engine.read(request, 100)
    engine.finish()
    for request in engine.prompts:
        engine.check(request)


def test_nobody_makes_way_if_it_would_not_be_enough():
    engine = Engine(pages=14)
    for i in range(3):
        engine.submit([i, *range(40)], 60, client="a")
    for _ in range(20):
        engine.turn()
    engine.submit(range(170), 10, client="b")
    for _ in range(10):
        engine.turn()
    assert engine.scheduler.running == 2
    assert engine.scheduler.preemptions_total == 0
    engine.finish()


def test_fewer_places_are_given_back_at_once(engine):
    for i in range(SEQUENCES):
        engine.submit([i, *range(20)], 60)
    for _ in range(12):
        engine.turn()
    engine.send(set_limits=worker_pb2.SetLimits(kv_bytes=PLAN.kv_bytes, max_sequences=1))
    engine.turn()
    assert engine.scheduler.running == 1
    engine.finish()
    for request in engine.prompts:
        engine.check(request)


def test_an_answer_that_cannot_go_on_ends_alone(engine):
    broken, whole = engine.submit(range(20), 30), engine.submit(range(20, 40), 30)

    def push(token, *, may_stop=True):
        raise RuntimeError("this text cannot be decoded")

    engine.intake.requests[broken].text.push = push
    engine.finish()
    assert engine.reason(broken) == "INTERNAL"
    engine.check(whole)
