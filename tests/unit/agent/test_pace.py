"""The share of time in which the worker computes, on a virtual clock: steps cost time, waits pass it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.v1 import worker_pb2
from edgellm_agent.worker.pace import Pace
from tests.unit.agent.engine import PAGE_BYTES, PLAN, SEQUENCES, Channel, Clock, Engine


class WaitingChannel(Channel):
    """Waits as the real one does: until the timeout, or until what is due arrives."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.waits = []
        self.due = []
        self.told = []

    def send(self, message):
        self.told.append(message)
        super().send(message)

    def receive(self, timeout_s, wake_fd=None):
        if not self.inbox and timeout_s != 0:
            assert timeout_s is not None, "nothing would ever wake it"
            end = self.clock() + timeout_s
            coming = min((at for at, _ in self.due), default=end)
            self.waits.append(max(0.0, min(end, coming) - self.clock()))
            self.clock.now += self.waits[-1]
        self.inbox += [message for at, message in self.due if at <= self.clock()]
        self.due = [(at, message) for at, message in self.due if at > self.clock()]
        taken, self.inbox = self.inbox, []
        return taken


@pytest.fixture
def engine():
    made = Engine(speculate=False)
    pace(made)
    yield made
    made.pool.close()


def pace(engine):
    engine.channel = engine.loop._channel = WaitingChannel(engine.clock)


def limits(share, kv_bytes=PLAN.kv_bytes, max_sequences=SEQUENCES):
    return worker_pb2.SetLimits(kv_bytes=kv_bytes, max_sequences=max_sequences, pace=share)


def computed_s(engine):
    """What the runner's steps took, by the clock's own rule."""
    return 0.003 * engine.runner.steps + 0.0005 * engine.runner.tokens


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_the_worker_computes_for_the_asked_share_of_the_time(engine, share):
    engine.send(set_limits=limits(share))
    for i in range(3):
        engine.submit([i, *range(40)], 60)
    began = engine.clock()
    engine.finish()
    steps_s, passed_s = computed_s(engine), engine.clock() - began
    assert steps_s == pytest.approx(share * passed_s, rel=0.02)
    for request in engine.prompts:
        engine.check(request)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_at_full_pace_it_never_waits_and_an_agent_that_says_nothing_means_that(engine, share):
    engine.send(set_limits=limits(share))
    engine.submit(range(30), 40)
    engine.finish()
    assert engine.channel.waits == []


def resting(engine, share=0.02):
    """A request whose next turn is a long rest away."""
    engine.send(set_limits=limits(share))
    request = engine.submit(range(60), 100)
    for _ in range(3):
        engine.turn()
    assert engine.loop._wait_s() > 0.1
    return request


def test_a_cancel_in_a_rest_is_obeyed_at_once(engine):
    request = resting(engine)
    steps, at = engine.runner.steps, engine.clock() + 0.01
    engine.channel.due.append((at, worker_pb2.ToWorker(cancel=worker_pb2.Cancel(id=request))))
    engine.turn()
    assert engine.reason(request) == "CANCELLED"
    assert engine.clock() == pytest.approx(at)
    assert engine.runner.steps == steps
    assert engine.pool.stats().promised_bytes == 0


def test_a_deadline_in_a_rest_is_honoured_when_it_passes(engine):
    engine.send(set_limits=limits(0.02))
    deadline = engine.clock() + 0.6
    request = engine.submit(range(60), 100, deadline=deadline)
    engine.finish()
    assert engine.reason(request) == "DEADLINE"
    assert engine.clock() == pytest.approx(deadline, abs=1e-6)


def test_a_ping_in_a_rest_is_answered_and_computes_nothing(engine):
    resting(engine)
    steps, at = engine.runner.steps, engine.clock() + 0.01
    engine.channel.due.append((at, worker_pb2.ToWorker(ping=worker_pb2.Ping())))
    engine.loop.turn()
    assert engine.channel.sent[-1].stats.running_sequences == 1
    assert engine.runner.steps == steps


def test_a_new_pace_changes_the_rest_that_is_under_way(engine):
    resting(engine)
    steps = engine.runner.steps
    engine.send(set_limits=limits(1.0))
    before = engine.clock()
    engine.turn()
    assert engine.runner.steps == steps + 1
    assert engine.clock() - before < 0.01


def test_memory_is_given_back_in_a_rest_and_not_after_it(engine):
    resting(engine)
    steps = engine.runner.steps
    engine.send(set_limits=limits(0.02, kv_bytes=2 * PAGE_BYTES))
    engine.turn()
    assert engine.pool.stats().used_bytes <= 2 * PAGE_BYTES
    assert engine.runner.steps == steps


def test_time_without_work_counts_as_rest(engine):
    engine.send(set_limits=limits(0.25))
    engine.submit(range(40), 1)
    engine.finish()
    engine.clock.now += 60
    engine.channel.waits.clear()
    engine.submit(range(50, 90), 1)
    engine.finish()
    assert engine.channel.waits == []


def test_a_request_that_comes_in_a_rest_waits_for_its_end_only(engine):
    engine.send(set_limits=limits(0.05))
    engine.submit(range(40), 1)
    engine.finish()
    rest_s = engine.loop._pace.rest_s()
    assert rest_s > 0
    came = engine.clock()
    second = engine.submit(range(50, 90), 1)
    engine.finish()
    assert engine.channel.waits == [pytest.approx(rest_s)]
    assert second in engine.ended
    assert engine.clock() - came < rest_s + 0.1


def test_a_request_that_comes_after_a_stricter_pace_is_not_forgotten(engine):
    engine.send(set_limits=limits(0.5))
    engine.submit(range(40), 1)
    engine.finish()
    engine.turn()
    assert not engine.loop._busy
    engine.send(set_limits=limits(0.02))
    second = engine.submit(range(50, 90), 1)
    engine.finish()
    engine.check(second)
    assert engine.channel.waits[-1] > 0.1


def test_a_drain_ends_though_the_worker_rests(engine):
    engine.send(set_limits=limits(0.05))
    request = engine.submit(range(20), 5)
    engine.turn()
    engine.send(drain=worker_pb2.Drain())
    engine.finish()
    assert engine.channel.told[-1].HasField("drained")
    engine.check(request)


def test_a_turn_that_took_for_ever_does_not_stop_the_streams_for_good():
    clock = Clock()
    tried = Pace(clock)
    tried.set_share(0.02)
    tried.begin()
    clock.now += 3600
    tried.end()
    assert tried.rest_s() == 20


@settings(max_examples=30, deadline=None)
@given(
    shares=st.lists(st.sampled_from([0.02, 0.1, 0.3, 0.7, 1.0]), min_size=1, max_size=6),
    prompts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=6),
)
def test_whatever_the_pace_every_text_is_what_it_is_alone(shares, prompts):
    engine = Engine()
    pace(engine)
    for i, (length, max_tokens) in enumerate(prompts):
        engine.submit([i, *range(length)], max_tokens)
        engine.send(set_limits=limits(shares[i % len(shares)]))
        engine.turn()
    engine.finish()
    for request in engine.prompts:
        engine.check(request)
    engine.pool.close()
