import ctypes
import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.paged import PagedKvMemory
from edgellm_agent.worker.kv.pool import MIN_PREFIX_TOKENS, KvPool, TooLargeError

GEOMETRY = KvGeometry(layers=1, kv_heads=2, head_dim=64, item_bytes=4)
PAGE_TOKENS = 16
CONTEXT = 12 * PAGE_TOKENS
PAGE_BYTES = PAGE_TOKENS * GEOMETRY.bytes_per_token


def view(memory, place):
    tensor = memory.spaces[place.space].keys[0]
    raw = (ctypes.c_float * (tensor.slot_stride_bytes // 4)).from_address(
        tensor.address + place.slot * tensor.slot_stride_bytes
    )
    return np.ctypeslib.as_array(raw).reshape(tensor.shape[1:])


def key_of(tokens):
    """What a model would write at the last position: it depends on all tokens before."""
    return np.float32(int.from_bytes(hashlib.blake2s(repr(list(tokens)).encode()).digest()[:2], "big") + 1)


def write(memory, place, tokens, first):
    for position in range(first, len(tokens)):
        view(memory, place)[:, position] = key_of(tokens[: position + 1])


def make(pages=64, slots=6):
    memory = PagedKvMemory(GEOMETRY, slots, CONTEXT)
    return memory, KvPool(memory, pages * PAGE_BYTES)


@pytest.fixture
def pool():
    made = make()
    yield made
    made[1].close()


def finish(pool, memory, sequence, tokens):
    """A sequence that was computed whole, and ended."""
    first = pool.attach(sequence, tokens)
    write(memory, pool.place(sequence), tokens, first)
    pool.advance(sequence, len(tokens))
    pool.release(sequence, keep=True)
    return first


def test_a_chat_that_goes_on_takes_over_the_memory_of_its_last_turn(pool):
    memory, pool = pool
    turn = list(range(100))
    finish(pool, memory, 1, turn)
    assert pool.attach(2, [*turn, 7, 8, 9]) == 100
    assert pool.stats().cached_bytes == 0


def test_a_shared_beginning_is_copied_and_stays_for_the_next(pool):
    memory, pool = pool
    shared = list(range(64))
    finish(pool, memory, 1, [*shared, *range(200, 260)])
    assert pool.attach(2, [*shared, 1, 2]) == 64
    assert pool.attach(3, [*shared, 3, 4]) == 64
    expected = [key_of(shared[: i + 1]) for i in range(64)]
    for sequence in (2, 3):
        assert (view(memory, pool.place(sequence))[0, :64, 0] == expected).all()


def test_a_running_sequence_lends_what_it_has_computed_and_no_more(pool):
    memory, pool = pool
    tokens = list(range(90))
    pool.attach(1, tokens)
    write(memory, pool.place(1), tokens[:48], 0)
    pool.advance(1, 48)
    assert pool.attach(2, tokens) == 48


def test_the_last_token_is_always_computed_again(pool):
    memory, pool = pool
    tokens = list(range(50))
    finish(pool, memory, 1, tokens)
    assert pool.attach(2, tokens) == 49


def test_a_short_common_beginning_is_not_worth_a_copy(pool):
    memory, pool = pool
    finish(pool, memory, 1, list(range(50)))
    assert pool.attach(2, [*range(MIN_PREFIX_TOKENS - 1), 999, 998]) == 0


def test_cached_prefixes_make_way_the_least_recently_used_first():
    memory, pool = make(pages=9)
    finish(pool, memory, 1, list(range(48)))
    finish(pool, memory, 2, list(range(100, 148)))
    finish(pool, memory, 3, list(range(200, 248)))
    assert pool.attach(4, [*range(30), 5]) == 30  # two pages more than there are: 2 goes, 1 was just used
    pool.release(4)
    assert pool.attach(5, [*range(200, 230), 5]) == 30
    pool.release(5)
    assert pool.attach(6, [*range(100, 130), 5]) == 0
    pool.close()


def test_shrinking_drops_prefixes_at_once_and_tells_what_live_sequences_hold_beyond(pool):
    memory, pool = pool
    finish(pool, memory, 1, list(range(50)))
    pool.attach(2, list(range(100, 140)))
    pool.resize(2 * PAGE_BYTES)
    assert pool.stats().cached_bytes == 0
    assert pool.over_bytes == PAGE_BYTES
    pool.check_fits(64 * PAGE_TOKENS)  # what was granted may come back
    with pytest.raises(TooLargeError):
        pool.check_fits(64 * PAGE_TOKENS + 1)


class PoolMachine(RuleBasedStateMachine):
    """Whatever is done to it: content is that of the sequence's own tokens, bytes stay within the bound."""

    def __init__(self):
        super().__init__()
        self.memory, self.pool = make(pages=16, slots=5)
        self.live: dict[int, tuple[list[int], int]] = {}
        self.rooms: dict[int, int] = {}
        self.next_id = 0

    def teardown(self):
        self.pool.close()

    # Few different tokens, so that prefixes are often shared.
    @rule(family=st.integers(0, 2), shared=st.integers(0, 100), tail=st.lists(st.integers(0, 1), max_size=40))
    def attach(self, family, shared, tail):
        tokens = [family * 1000 + i for i in range(shared)] + [*tail, 5]
        self.next_id += 1
        before = sum(self.pool.bytes_for(self.rooms[s]) for s in self.live)
        cached = self.pool.attach(self.next_id, tokens)
        if cached is None:
            fits = before + self.pool.bytes_for(len(tokens)) <= self.pool.bound_bytes
            assert not fits or len(self.live) == 5
            return
        assert 0 <= cached < len(tokens)
        self.live[self.next_id] = (tokens, cached)
        self.pool.advance(self.next_id, cached)
        self.rooms[self.next_id] = len(tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chunk=st.integers(1, 60))
    def compute(self, data, chunk):
        sequence = data.draw(st.sampled_from(sorted(self.live)))
        tokens, computed = self.live[sequence]
        until = min(computed + chunk, len(tokens))
        write(self.memory, self.pool.place(sequence), tokens[:until], computed)
        self.pool.advance(sequence, until)
        self.live[sequence] = (tokens, until)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(1, 40))
    def grow(self, data, more):
        sequence = data.draw(st.sampled_from(sorted(self.live)))
        tokens, _ = self.live[sequence]
        if len(tokens) + more > CONTEXT:
            return
        if self.pool.grow(sequence, len(tokens) + more):
            tokens.extend(range(more))
            self.rooms[sequence] = max(self.rooms[sequence], len(tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data, keep):
        sequence = data.draw(st.sampled_from(sorted(self.live)))
        _, computed = self.live.pop(sequence)
        assert self.pool.release(sequence, keep=keep) == self.pool.bytes_for(computed)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def arrange(self, data):
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
        for group in self.pool.arrange(wanted):
            slots = [self.pool.place(s).slot for s in group]
            assert slots == list(range(slots[0], slots[0] + len(group)))

    @rule(pages=st.integers(4, 16))
    def resize(self, pages):
        self.pool.resize(pages * PAGE_BYTES)
        while self.pool.over_bytes:
            sequence = max(self.live)
            del self.live[sequence]
            self.pool.release(sequence, keep=True)

    @invariant()
    def content_is_that_of_the_sequences_own_tokens(self):
        for sequence, (tokens, computed) in self.live.items():
            held = view(self.memory, self.pool.place(sequence))[:, :computed]
            expected = [key_of(tokens[: i + 1]) for i in range(computed)]
            assert (held == np.array(expected, np.float32).reshape(1, computed, 1)).all()

    @invariant()
    def the_books_are_within_the_bound(self):
        stats = self.pool.stats()
        used = sum(self.pool.bytes_for(computed) for _, computed in self.live.values())
        assert stats.used_bytes - stats.cached_bytes == used
        assert stats.promised_bytes == sum(self.pool.bytes_for(self.rooms[s]) for s in self.live)
        assert stats.promised_bytes + stats.cached_bytes <= stats.bound_bytes


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
