import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_agent.worker.kv_memory import KvGeometry, KvMemory
from edgellm_agent.worker.kv_pool import KvPool, TooLargeError
from edgellm_agent.worker.scheduler import Limits, QueueFullError, Scheduler
from tests.unit.agent.sequences import make

GEOMETRY = KvGeometry(layers=1, kv_heads=1, head_dim=64, item_bytes=4)


@pytest.fixture
def new_scheduler():
    pools = []

    def new(*, tokens=256, max_sequences=4, max_waiting=8, prefill_tokens=16):
        pool = KvPool(KvMemory(GEOMETRY, max_sequences + 1, tokens), GEOMETRY.bytes_for(tokens))
        pools.append(pool)
        return Scheduler(pool, Limits(max_sequences, max_waiting, prefill_tokens))

    yield new
    for pool in pools:
        pool.close()


def compute(scheduler, work):
    """What the loop does with a step's work: computed tokens, and a new one where the work ends in one."""
    ended = []
    for w in work:
        w.sequence.computed = w.until
        if w.samples:
            w.sequence.tokens.append(7)
            w.sequence.credit -= 1
            if w.sequence.generated == w.sequence.max_tokens:
                scheduler.remove(w.sequence.id)
                ended.append(w.sequence.id)
    return ended


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_at_its_end(new_scheduler):
    scheduler = new_scheduler()
    scheduler.add(make(1, prompt=40))
    steps = []
    for _ in range(3):
        work = scheduler.schedule()
        steps.append([(w.until, w.samples) for w in work])
        compute(scheduler, work)
    assert steps == [[(16, False)], [(32, False)], [(40, True)]]


def test_a_long_prompt_takes_turns_with_running_streams(new_scheduler):
    scheduler = new_scheduler()
    scheduler.add(make(1, prompt=4, max_tokens=50))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make(2, prompt=100))
    kinds = []
    for _ in range(8):
        work = scheduler.schedule()
        kinds.append([w.sequence.id for w in work])
        compute(scheduler, work)
    assert kinds == [[1], [2], [1], [2], [1], [2], [1], [2]]


def test_a_newcomer_joins_the_running_batch(new_scheduler):
    scheduler = new_scheduler()
    for i in (1, 2, 3):
        scheduler.add(make(i, max_tokens=20))
    seen = set()
    for _ in range(8):
        work = scheduler.schedule()
        seen.add(len(work))
        compute(scheduler, work)
    assert max(seen) == 3


def test_a_sequence_that_can_never_fit_is_refused_with_the_figures(new_scheduler):
    scheduler = new_scheduler(tokens=64)
    with pytest.raises(TooLargeError) as refused:
        scheduler.add(make(1, prompt=60, max_tokens=60))
    assert refused.value.needed_bytes == GEOMETRY.bytes_for(120)
    assert refused.value.available_bytes == GEOMETRY.bytes_for(64)


def test_a_full_queue_refuses(new_scheduler):
    scheduler = new_scheduler(max_waiting=2)
    scheduler.add(make(1))
    scheduler.add(make(2))
    with pytest.raises(QueueFullError):
        scheduler.add(make(3))


def test_a_stream_without_credit_waits_and_the_others_go_on(new_scheduler):
    scheduler = new_scheduler()
    scheduler.add(make(1, credit=1))
    scheduler.add(make(2))
    for _ in range(4):
        compute(scheduler, scheduler.schedule())
    assert [w.sequence.id for w in scheduler.schedule()] == [2]
    scheduler.find(1).credit += 1
    assert {w.sequence.id for w in scheduler.schedule()} == {1, 2}


def test_expired_finds_waiting_and_running_sequences(new_scheduler):
    scheduler = new_scheduler(max_sequences=1)
    scheduler.add(make(1, deadline=5.0))
    scheduler.add(make(2, deadline=3.0))
    scheduler.schedule()
    assert scheduler.next_deadline() == 3.0
    assert [s.id for s in scheduler.expired(4.0)] == [2]
    assert [s.id for s in scheduler.expired(5.0)] == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_every_sequence_ends_once_whatever_comes_when(arrivals, max_sequences):
    pool = KvPool(KvMemory(GEOMETRY, max_sequences + 1, 160), GEOMETRY.bytes_for(160))
    scheduler = Scheduler(pool, Limits(max_sequences, 100, 16))
    ended = []
    try:
        due = sorted((at, i + 1, prompt, tokens) for i, (prompt, tokens, at) in enumerate(arrivals))
        for step in range(5000):
            while due and due[0][0] <= step:
                _, i, prompt, tokens = due.pop(0)
                scheduler.add(make(i, prompt, tokens))
            work = scheduler.schedule()
            assert len(work) <= max_sequences
            assert sum(w.until - w.sequence.computed > 1 for w in work) <= 1
            stats = pool.stats()
            assert stats.promised_bytes <= stats.bound_bytes
            ended += compute(scheduler, work)
            if not due and not work:
                break
        assert sorted(ended) == list(range(1, len(arrivals) + 1))
        assert pool.stats().promised_bytes == 0
    finally:
        pool.close()
