import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.buckets import Bucket, HostAllocator, SlotBucketKvMemory, divide
from tests.unit.agent.kv.tensors import holds, write

GEOMETRY = KvGeometry(layers=2, kv_heads=2, head_dim=16, item_bytes=4)
TOKEN_BYTES = GEOMETRY.bytes_per_token


class CountingAllocator(HostAllocator):
    """Knows what it gave and what was copied."""

    def __init__(self, allocations=100):
        super().__init__()
        self.left = allocations
        self.taken: dict[int, int] = {}
        self.copied_bytes = 0

    def allocate(self, size_bytes):
        if self.left == 0:
            raise MemoryError("no more")
        self.left -= 1
        address = super().allocate(size_bytes)
        self.taken[address] = size_bytes
        return address

    def free(self, address):
        super().free(address)
        del self.taken[address]

    def copy(self, source, target, row_bytes, rows):
        self.copied_bytes += row_bytes * rows
        super().copy(source, target, row_bytes, rows)


@pytest.fixture
def allocator():
    return CountingAllocator()


@pytest.fixture
def new_memory(allocator):
    made = []

    def new(*buckets):
        memory = SlotBucketKvMemory(GEOMETRY, [Bucket(*bucket) for bucket in buckets], allocator)
        made.append(memory)
        return memory

    yield new
    for memory in made:
        memory.close()


def filled(memory, tokens):
    handle = memory.allocate(tokens)
    write(memory, handle, 0, marks(handle, tokens))
    return handle


def marks(handle, tokens):
    return list(range(100 * handle, 100 * handle + tokens))


def total_bytes(buckets, geometry):
    return sum(b.slots * b.capacity_tokens for b in buckets) * geometry.bytes_per_token


geometries = st.builds(
    KvGeometry,
    layers=st.integers(1, 48),
    kv_heads=st.integers(1, 32),
    head_dim=st.sampled_from([16, 48, 64, 80, 128]),
    item_bytes=st.sampled_from([1, 2, 4]),
)


@settings(max_examples=300, deadline=None)
@given(geometries, st.integers(1, 40_000), st.integers(1, 16), st.floats(0.8, 20))
def test_the_bound_is_divided_without_exceeding_it(geometry, context, max_sequences, contexts):
    bound = int(context * contexts) * geometry.bytes_per_token
    try:
        buckets = divide(bound, geometry, context, max_sequences)
    except ValueError:
        # At most 255 tokens are added to align a slot.
        assert bound < (context + 255) * geometry.bytes_per_token
        return
    left = bound - total_bytes(buckets, geometry)
    capacities = [bucket.capacity_tokens for bucket in buckets]
    assert left >= 0
    assert capacities == sorted(set(capacities))
    assert context <= capacities[-1] < context + 256
    assert all(1 <= bucket.slots <= max_sequences for bucket in buckets)
    assert buckets == divide(bound, geometry, context, max_sequences)
    for bucket in buckets:
        slot_bytes = bucket.capacity_tokens * geometry.bytes_per_token
        assert slot_bytes // (2 * geometry.layers) % 256 == 0, "slots are aligned"
        assert bucket.slots == max_sequences or left < slot_bytes, "no useful slot is left out"
        assert bucket == buckets[-1] or 2 * bucket.capacity_tokens <= capacities[-1]


@pytest.mark.parametrize(
    ("bound_tokens", "context", "max_sequences", "expected"),
    [
        # All may be as long as they like: no sizes, no moves.
        (4 * 8192, 8192, 4, [(8192, 4)]),
        (300, 300, 1, [(300, 1)]),
        # One long one; the rest first lets four be short, then some grow.
        (18_000, 8192, 4, [(512, 4), (2048, 3), (8192, 1)]),
        (8192 + 2048, 8192, 4, [(2048, 1), (8192, 1)]),
        # Everyone has every smaller size: what is left makes a second long one.
        (4 * 8192 - 1, 8192, 4, [(512, 4), (2048, 4), (8192, 2)]),
        # 2048 is too close to 3000 to be worth a move.
        (8000, 3000, 3, [(512, 3), (3000, 2)]),
        # Two tokens of this model are 256 bytes of a slot.
        (1024, 1023, 3, [(1024, 1)]),
    ],
)
def test_the_rest_goes_to_small_slots_first(bound_tokens, context, max_sequences, expected):
    buckets = divide(bound_tokens * TOKEN_BYTES, GEOMETRY, context, max_sequences)
    assert [(b.capacity_tokens, b.slots) for b in buckets] == expected


def test_a_bound_below_one_sequence_is_refused_with_the_figures():
    with pytest.raises(ValueError, match=rf"bound_bytes: .*{1024 * TOKEN_BYTES:,}.*{1023 * TOKEN_BYTES:,}"):
        divide(1023 * TOKEN_BYTES, GEOMETRY, 1024, 1)


@pytest.mark.parametrize(("context", "max_sequences"), [(0, 1), (1, 0)])
def test_no_context_or_no_sequences_is_refused(context, max_sequences):
    with pytest.raises(ValueError, match="at least 1"):
        divide(1 << 30, GEOMETRY, context, max_sequences)


@pytest.mark.parametrize(
    "buckets", [[], [Bucket(8, 0)], [Bucket(8, 1), Bucket(8, 1)], [Bucket(9, 1), Bucket(8, 1)]]
)
def test_buckets_out_of_order_are_refused(buckets, allocator):
    with pytest.raises(ValueError, match="buckets"):
        SlotBucketKvMemory(GEOMETRY, buckets, allocator)
    assert not allocator.taken


def test_it_takes_the_buckets_and_the_swap_and_gives_all_back(allocator):
    buckets = divide(3000 * TOKEN_BYTES, GEOMETRY, 1500, 4)
    memory = SlotBucketKvMemory(GEOMETRY, buckets, allocator, swap_bytes=4096)
    assert sum(allocator.taken.values()) == total_bytes(buckets, GEOMETRY) + 4096
    memory.close()
    memory.close()
    assert not allocator.taken


@pytest.mark.parametrize("allocations", [0, 1, 2])
def test_an_allocator_that_refuses_half_way_leaves_nothing_taken(allocations):
    allocator = CountingAllocator(allocations)
    with pytest.raises(MemoryError):
        SlotBucketKvMemory(GEOMETRY, (Bucket(8, 1), Bucket(16, 1)), allocator)
    assert not allocator.taken


def test_host_memory_that_the_kernel_refuses_is_a_memory_error():
    with pytest.raises(MemoryError, match="KV cache"):
        HostAllocator().allocate(1 << 60)


def test_bytes_are_those_of_the_smallest_slot_that_holds_the_tokens(new_memory):
    memory = new_memory((8, 2), (32, 1))
    assert [memory.bytes_for(t) // TOKEN_BYTES for t in (0, 1, 8, 9, 32, 33)] == [0, 8, 8, 32, 32, 33]


def test_a_short_sequence_waits_rather_than_take_a_long_slot(new_memory):
    memory = new_memory((8, 1), (32, 1))
    short = memory.allocate(8)
    assert memory.allocate(3) is None
    assert memory.allocate(9) is not None
    memory.free(short)
    assert memory.allocate(3) is not None


def test_growing_copies_what_is_held_once_per_size_and_nothing_else(new_memory, allocator):
    memory = new_memory((8, 2), (32, 2))
    handle = filled(memory, 6)
    assert memory.extend(handle, 6, 8)
    assert allocator.copied_bytes == 0
    assert memory.extend(handle, 6, 9)
    assert allocator.copied_bytes == 6 * TOKEN_BYTES
    assert memory.place(handle).space == 1
    assert holds(memory, handle, marks(handle, 6))
    assert memory.extend(handle, 6, 32)
    assert allocator.copied_bytes == 6 * TOKEN_BYTES


def test_growing_gives_the_smaller_slot_to_the_next(new_memory):
    memory = new_memory((8, 1), (32, 1))
    handle = filled(memory, 8)
    assert memory.allocate(8) is None
    assert memory.extend(handle, 8, 20)
    assert memory.allocate(8) is not None


def test_growing_is_refused_while_no_larger_slot_is_free_and_changes_nothing(new_memory):
    memory = new_memory((8, 2), (32, 1))
    long = memory.allocate(32)
    handle = filled(memory, 8)
    before = memory.place(handle)
    assert not memory.extend(handle, 8, 9)
    assert memory.place(handle) == before
    assert holds(memory, handle, marks(handle, 8))
    memory.free(long)
    assert memory.extend(handle, 8, 9)


def test_more_tokens_than_a_slot_has_are_not_copied(new_memory):
    memory = new_memory((8, 1), (32, 1))
    short, long = memory.allocate(8), memory.allocate(32)
    with pytest.raises(ValueError, match="9 do not fit"):
        memory.copy(long, short, 9)


def test_rows_of_several_sizes_become_a_group_for_each(new_memory):
    memory = new_memory((8, 3), (32, 3))
    a, b, c, d = (memory.allocate(tokens) for tokens in (8, 32, 8, 32))
    assert memory.arrange([d, a, c, b]) == [[a, c], [b, d]]
    assert memory.arrange([]) == []


def test_rows_that_are_adjacent_already_stay_wherever_they_are(new_memory, allocator):
    memory = new_memory((8, 5))
    handles = [filled(memory, 8) for _ in range(5)]
    assert memory.arrange([handles[4], handles[2], handles[3]]) == [handles[2:]]
    assert memory.arrange([handles[1]]) == [[handles[1]]]
    assert allocator.copied_bytes == 0


def test_a_hole_is_filled_by_the_row_that_costs_least(new_memory, allocator):
    memory = new_memory((8, 4))
    short, gone, longer, longest = (filled(memory, tokens) for tokens in (2, 1, 5, 8))
    memory.free(gone)
    assert memory.arrange([short, longer, longest]) == [[short, longer, longest]]
    assert allocator.copied_bytes == 2 * TOKEN_BYTES


def test_an_unwanted_row_makes_way_into_a_free_slot(new_memory, allocator):
    memory = new_memory((8, 4))
    a, unwanted, b = (filled(memory, tokens) for tokens in (8, 3, 4))
    assert memory.arrange([a, b]) == [[a, b]]
    assert allocator.copied_bytes == (3 + 4) * TOKEN_BYTES
    assert all(holds(memory, h, marks(h, t)) for h, t in ((a, 8), (unwanted, 3), (b, 4)))


def test_in_a_full_bucket_two_change_places(new_memory, allocator):
    memory = new_memory((8, 3))
    a, unwanted, b = (filled(memory, tokens) for tokens in (8, 3, 4))
    assert memory.arrange([a, b]) == [[a, b]]
    assert allocator.copied_bytes == 3 * 4 * TOKEN_BYTES
    assert all(holds(memory, h, marks(h, t)) for h, t in ((a, 8), (unwanted, 3), (b, 4)))


def test_an_unwanted_row_makes_way_once(new_memory, allocator):
    memory = new_memory((8, 5))
    a, unwanted, gone, b, c = (filled(memory, tokens) for tokens in (8, 1, 1, 1, 1))
    memory.free(gone)
    (group,) = memory.arrange([a, b, c])
    assert [memory.place(handle).slot for handle in group] == [0, 1, 2]
    assert allocator.copied_bytes == 3 * TOKEN_BYTES
    assert all(holds(memory, h, marks(h, t)) for h, t in ((a, 8), (unwanted, 1), (b, 1), (c, 1)))


def test_two_change_places_in_pieces_when_they_are_larger_than_the_swap(allocator):
    memory = SlotBucketKvMemory(GEOMETRY, [Bucket(8, 3)], allocator, swap_bytes=300)
    try:
        a, unwanted, b = (filled(memory, tokens) for tokens in (8, 7, 8))
        assert memory.arrange([a, b]) == [[a, b]]
        assert all(holds(memory, h, marks(h, t)) for h, t in ((a, 8), (unwanted, 7), (b, 8)))
    finally:
        memory.close()


def test_what_came_after_an_extend_within_the_slot_moves_too(new_memory):
    memory = new_memory((8, 3))
    a, unwanted, b = (filled(memory, 1) for _ in range(3))
    for handle in (a, unwanted, b):
        assert memory.extend(handle, 1, 8)
        write(memory, handle, 0, marks(handle, 8))
    assert memory.arrange([a, b]) == [[a, b]]
    assert all(holds(memory, h, marks(h, 8)) for h in (a, unwanted, b))


def test_what_was_trimmed_is_not_copied_any_more(new_memory, allocator):
    memory = new_memory((8, 3))
    a, unwanted, b = (filled(memory, 8) for _ in range(3))
    for handle, tokens in ((unwanted, 1), (b, 2)):
        memory.trim(handle, tokens)
    memory.arrange([a, b])
    assert allocator.copied_bytes == 3 * 2 * TOKEN_BYTES
