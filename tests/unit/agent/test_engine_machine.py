"""The worker's loop under requests that come and go in any order."""

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgellm.v1 import worker_pb2
from edgellm_agent.worker.kv.buckets import Bucket
from tests.unit.agent.engine import CONTEXT, PAGE_BYTES, PAGE_TOKENS, PAGES, SEQUENCES, Engine


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
