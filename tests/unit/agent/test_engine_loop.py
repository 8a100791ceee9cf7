"""The worker's loop with everything real but the model, the text and the channel."""

from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgellm.v1 import device_pb2, worker_pb2
from edgellm_agent.worker.kv.buckets import Bucket, HostAllocator, SlotBucketKvMemory
from edgellm_agent.worker.kv.paged import PagedKvMemory
from edgellm_agent.worker.kv.pool import KvPool
from edgellm_agent.worker.loop import EngineLoop, LoadedEngine
from edgellm_agent.worker.prefill import PrefillBudget
from edgellm_agent.worker.scheduler import Limits, Scheduler
from edgellm_agent.worker.speculation import StepTimes
from edgellm_agent.worker.stepper import Stepper
from edgellm_agent.worker.waiting import WaitingQueue
from tests.unit.agent import sequences
from tests.unit.agent.hash_model import GEOMETRY, HashRunner, alone

PAGE_TOKENS = 16
CONTEXT = 12 * PAGE_TOKENS
PAGE_BYTES = PAGE_TOKENS * GEOMETRY.bytes_per_token
SEQUENCES = 4
PAGES = 24
PLAN = device_pb2.MemoryPlan(kv_bytes=PAGES * PAGE_BYTES, max_sequences=SEQUENCES, context_tokens=CONTEXT)


class Channel:
    """What the agent sends and gets."""

    def __init__(self):
        self.inbox = []
        self.sent = []
        self.runnable = bool

    def receive(self, timeout_s, wake_fd=None):
        assert timeout_s == 0 or self.inbox or not self.runnable(), "sleeps with work left"
        taken, self.inbox = self.inbox, []
        return taken

    def send(self, message):
        self.sent.append(message)


class Intake:
    """Prepares at once."""

    wake_fd = -1

    def __init__(self):
        self._ready = []
        self.requests = {}
        self.pending = 0

    def submit(self, submit, arrived):
        self._ready.append((submit, self.requests[submit.id]))

    def take(self):
        taken, self._ready = self._ready, []
        return taken

    def cancel(self, request_id):
        return False

    def expired(self, now):
        return []

    def next_deadline(self):
        return None


class Clock:
    """A step takes 3 ms, and half a millisecond for each of its tokens."""

    def __init__(self):
        self.now = 1.0
        self.runner = None

    def __call__(self):
        steps, tokens = (self.runner.steps, self.runner.tokens) if self.runner else (0, 0)
        return self.now + 0.003 * steps + 0.0005 * tokens


class Engine:
    """A loop and its agent's end."""

    def __init__(self, *, several=False, max_waiting=16, speculate=True, pages=PAGES, buckets=()):
        self.clock = Clock()
        if buckets:
            memory = SlotBucketKvMemory(GEOMETRY, buckets, HostAllocator())
        else:
            memory = PagedKvMemory(GEOMETRY, 2 * SEQUENCES, CONTEXT)
        self.pool = KvPool(memory, pages * PAGE_BYTES)
        self.runner = self.clock.runner = HashRunner(memory.spaces, several_multi_token_rows=several)
        budget, times = PrefillBudget(0.03, 128), StepTimes()
        limits = Limits(SEQUENCES, speculate=speculate, several_multi_token_rows=several)
        self.scheduler = Scheduler(self.pool, WaitingQueue(max_waiting), budget, times, limits)
        self.channel, self.intake = Channel(), Intake()
        stepper = Stepper(self.runner, self.pool, budget, {}, times, self.clock)
        self.loop = EngineLoop(
            LoadedEngine(PLAN, self.intake, self.scheduler, stepper), self.channel, self.clock
        )
        self.channel.runnable = self.runnable
        self.next_id = 0
        self.granted = {}
        self.prompts = {}
        self.answers = {}
        self.ended = {}

    def submit(self, tokens, max_tokens, *, credit=10_000, client="", deadline=None):
        self.next_id += 1
        self.prompts[self.next_id] = (list(tokens), max_tokens)
        self.answers[self.next_id] = []
        self.granted[self.next_id] = credit
        self.intake.requests[self.next_id] = sequences.make(
            self.next_id,
            tokens=tokens,
            max_tokens=max_tokens,
            credit=credit,
            client=client,
            deadline=deadline,
            arrived=self.clock(),
        )
        self.channel.inbox.append(worker_pb2.ToWorker(submit=worker_pb2.Submit(id=self.next_id)))
        return self.next_id

    def runnable(self):
        """Whether something runs whose reader waits for it."""
        return any(s.credit > 0 for s in self.scheduler._running.values())

    def read(self, request, tokens):
        self.granted[request] += tokens
        self.send(credit=worker_pb2.Credit(id=request, tokens=tokens))

    def send(self, **message):
        self.channel.inbox.append(worker_pb2.ToWorker(**message))

    def turn(self):
        self.loop.turn()
        for message in self.channel.sent:
            for delta in message.step.deltas:
                assert delta.id not in self.ended
                self.answers[delta.id].extend(delta.token_ids)
            if message.HasField("ended"):
                assert message.ended.id not in self.ended, "ended twice"
                self.ended[message.ended.id] = message.ended
        self.channel.sent.clear()

    def finish(self, turns=5000, but=None):
        for _ in range(turns):
            if {*self.prompts} - {*self.ended, but} == set():
                return
            self.turn()
        raise AssertionError(f"{self.next_id - len(self.ended)} requests never ended")

    def reason(self, request):
        return worker_pb2.FailureKind.Name(self.ended[request].failure.kind).removeprefix("FAILURE_KIND_")

    def check(self, request):
        prompt, max_tokens = self.prompts[request]
        answer = self.answers[request]
        assert answer == alone(prompt, max_tokens)[: len(answer)]
        assert len(answer) <= self.granted[request]
        if request in self.ended and self.ended[request].HasField("finished"):
            usage = self.ended[request].finished.usage
            assert len(answer) == max_tokens == usage.completion_tokens
            assert usage.prompt_tokens == len(prompt)
            assert usage.accepted_draft_tokens <= usage.draft_tokens


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


class EngineMachine(RuleBasedStateMachine):
    """Requests come and go in any order: each ends once, with the text that it has alone."""

    options: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.engine = Engine(**self.options)

    def teardown(self):
        engine = self.engine
        engine.turn()
        stalled = next((r for r in engine.prompts if r not in engine.ended), None)
        for request in engine.prompts:
            if request != stalled:
                engine.read(request, 1000)
        # One reader that takes nothing holds nobody up.
        engine.finish(but=stalled)
        if stalled is not None:
            engine.read(stalled, 1000)
        engine.finish()
        for request in engine.prompts:
            engine.check(request)
        stats = engine.pool.stats()
        assert stats.promised_bytes == 0
        assert stats.used_bytes == stats.cached_bytes
        engine.pool.close()

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 100),
        tail=st.lists(st.integers(0, 60), max_size=30),
        max_tokens=st.integers(1, 60),
        client=st.sampled_from("abc"),
        credit=st.sampled_from([1, 5, 10_000]),
    )
    def submit(self, family, length, tail, max_tokens, client, credit):
        prompt = [(family * 17 + i) % 61 for i in range(length)] + tail
        self.engine.submit(prompt, max_tokens, client=client, credit=credit)

    @rule(turns=st.integers(1, 30))
    def run(self, turns):
        for _ in range(turns):
            self.engine.turn()

    @precondition(lambda self: self.engine.prompts)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(sorted(self.engine.prompts)))
        self.engine.send(cancel=worker_pb2.Cancel(id=request))

    @precondition(lambda self: self.engine.prompts)
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def read(self, data, tokens):
        request = data.draw(st.sampled_from(sorted(self.engine.prompts)))
        self.engine.read(request, tokens)

    @rule(pages=st.integers(6, PAGES), sequences=st.integers(1, SEQUENCES))
    def set_limits(self, pages, sequences):
        limits = worker_pb2.SetLimits(kv_bytes=pages * PAGE_BYTES, max_sequences=sequences)
        self.engine.send(set_limits=limits)

    @invariant()
    def texts_agree(self):
        for request in self.engine.prompts:
            self.engine.check(request)

    @invariant()
    def memory_stays_within_the_bound_after_each_turn(self):
        stats = self.engine.pool.stats()
        assert stats.used_bytes <= PAGES * PAGE_BYTES


class SeveralRowsMachine(EngineMachine):
    options: ClassVar = {"several": True}


class BucketMachine(EngineMachine):
    """With the memory of a GPU: slots of three sizes, 24 pages in all, and steps that cover one size each."""

    options: ClassVar = {
        "several": True,
        "buckets": (Bucket(2 * PAGE_TOKENS, 2), Bucket(4 * PAGE_TOKENS, 2), Bucket(CONTEXT, 1)),
    }


TestOneLongRow = EngineMachine.TestCase
TestSeveralLongRows = SeveralRowsMachine.TestCase
TestBuckets = BucketMachine.TestCase
for each in (TestOneLongRow, TestSeveralLongRows, TestBuckets):
    each.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
del each
