"""What every KV memory keeps, whatever is done to it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.buckets import Bucket, HostAllocator, SlotBucketKvMemory
from edgellm_agent.worker.kv.paged import PagedKvMemory
from tests.unit.agent.kv.tensors import holds, write

GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=64, item_bytes=4)
LONGEST = 48

tokens_of_a_sequence = st.integers(1, LONGEST)


class MemoryContract(RuleBasedStateMachine):
    """Content stays with its handle; a refusal changes nothing."""

    def __init__(self):
        super().__init__()
        self.memory = self.make()
        self.room: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}
        self.freed: list[int] = []
        self.last_mark = 0

    def teardown(self):
        self.memory.close()

    def draw_handle(self, data):
        return data.draw(st.sampled_from(sorted(self.room)))

    def marks(self, tokens):
        self.last_mark += tokens
        return list(range(self.last_mark - tokens, self.last_mark))

    @initialize(lengths=st.lists(tokens_of_a_sequence, min_size=2, max_size=8))
    def begin_busy(self, lengths):
        for tokens in lengths:
            self.allocate(tokens)

    @rule(tokens=tokens_of_a_sequence)
    def allocate(self, tokens):
        handle = self.memory.allocate(tokens)
        if handle is None:
            assert self.room, "who is alone is not refused"
            return
        assert handle not in self.room
        assert handle not in self.freed
        self.room[handle] = tokens
        self.held[handle] = self.marks(tokens // 2)
        write(self.memory, handle, 0, self.held[handle])

    @precondition(lambda self: self.room)
    @rule(data=st.data(), tokens=tokens_of_a_sequence)
    def extend(self, data, tokens):
        handle = self.draw_handle(data)
        tokens = max(tokens, self.room[handle])
        if self.memory.extend(handle, len(self.held[handle]), tokens):
            self.room[handle] = tokens
        else:
            assert len(self.room) > 1, "who is alone is not refused"

    @precondition(lambda self: self.room)
    @rule(data=st.data(), tokens=tokens_of_a_sequence)
    def write(self, data, tokens):
        handle = self.draw_handle(data)
        marks = self.marks(min(tokens, self.room[handle] - len(self.held[handle])))
        write(self.memory, handle, len(self.held[handle]), marks)
        self.held[handle] += marks

    @precondition(lambda self: self.room)
    @rule(data=st.data(), tokens=st.integers(0, LONGEST))
    def trim(self, data, tokens):
        handle = self.draw_handle(data)
        before = {h: self.memory.place(h) for h in self.room}
        self.memory.trim(handle, tokens)
        assert {h: self.memory.place(h) for h in self.room} == before
        self.room[handle] = min(self.room[handle], tokens)
        del self.held[handle][tokens:]

    @precondition(lambda self: self.room)
    @rule(data=st.data())
    def free(self, data):
        handle = self.draw_handle(data)
        self.memory.free(handle)
        del self.room[handle], self.held[handle]
        self.freed.append(handle)

    @precondition(lambda self: len(self.room) > 1)
    @rule(data=st.data(), tokens=tokens_of_a_sequence)
    def copy(self, data, tokens):
        source, target = data.draw(st.permutations(sorted(self.room)))[:2]
        tokens = min(tokens, len(self.held[source]), self.room[target])
        self.memory.copy(source, target, tokens)
        self.held[target][:tokens] = self.held[source][:tokens]

    @precondition(lambda self: self.room)
    @rule(data=st.data())
    def arrange_step_after_step(self, data):
        batch = st.lists(st.sampled_from(sorted(self.room)), unique=True, min_size=1)
        for wanted in data.draw(st.lists(batch, min_size=1, max_size=5)):
            self.arrange(wanted)

    def arrange(self, wanted):
        groups = self.memory.arrange(wanted)
        assert sorted(handle for group in groups for handle in group) == sorted(wanted)
        spaces = []
        for group in groups:
            places = [self.memory.place(handle) for handle in group]
            assert len({place.space for place in places}) == 1
            assert [place.slot for place in places] == [places[0].slot + i for i in range(len(places))]
            spaces.append(places[0].space)
        assert len(set(spaces)) == len(spaces), "those of one space share a step"
        self.content_stays_with_its_handle()

    @rule(tokens=st.integers(1, 64))
    def ask_for_too_much(self, tokens):
        too_many = self.memory.capacity_tokens + tokens
        assert self.memory.allocate(too_many) is None
        for handle in self.room:
            assert not self.memory.extend(handle, len(self.held[handle]), too_many)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_after_free(self, data):
        freed = data.draw(st.sampled_from(self.freed))
        for use in (
            lambda: self.memory.place(freed),
            lambda: self.memory.trim(freed, 1),
            lambda: self.memory.free(freed),
            lambda: self.memory.arrange([*self.room, freed]),
            lambda: self.memory.copy(freed, next(iter(self.room), freed), 1),
            lambda: self.memory.extend(freed, 0, 1),
        ):
            with pytest.raises(KeyError):
                use()

    @invariant()
    def content_stays_with_its_handle(self):
        for handle, marks in self.held.items():
            assert holds(self.memory, handle, marks)

    @invariant()
    def no_two_share_a_slot(self):
        places = [self.memory.place(handle) for handle in self.room]
        assert len(set(places)) == len(places)
        for handle, place in zip(self.room, places, strict=True):
            for tensor in self.memory.spaces[place.space].keys + self.memory.spaces[place.space].values:
                assert 0 <= place.slot < tensor.shape[0]
                assert tensor.shape[2] >= self.room[handle]


class PagedContract(MemoryContract):
    """On a CPU."""

    def make(self):
        return PagedKvMemory(GEOMETRY, slots=3, context_tokens=LONGEST)


class BucketContract(MemoryContract):
    """On a device; two changing places do so in several pieces."""

    def make(self):
        buckets = (Bucket(8, 4), Bucket(20, 3), Bucket(LONGEST, 3))
        return SlotBucketKvMemory(GEOMETRY, buckets, HostAllocator(), swap_bytes=2 * 5 * 256 + 100)


TestPagedMemory = PagedContract.TestCase
TestBucketMemory = BucketContract.TestCase
TestPagedMemory.settings = TestBucketMemory.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None
)


@pytest.mark.parametrize("contract", [PagedContract, BucketContract])
def test_more_tokens_never_take_fewer_bytes_and_none_take_none(contract):
    memory = contract().memory
    try:
        figures = [memory.bytes_for(tokens) for tokens in range(2 * memory.capacity_tokens)]
    finally:
        memory.close()
    assert figures[0] == 0
    assert figures[1] > 0
    assert figures == sorted(figures)
    assert all(b >= t * GEOMETRY.bytes_per_token for t, b in enumerate(figures))
