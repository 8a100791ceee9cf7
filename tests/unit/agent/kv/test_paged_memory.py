import mmap
import re
from pathlib import Path

import pytest

from edgellm_agent.worker.kv import paged
from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.paged import PagedKvMemory
from tests.unit.agent.kv.tensors import holds, views, write


def rss_anon_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def memory():
    geometry = KvGeometry(layers=4, kv_heads=2, head_dim=64, item_bytes=4)
    made = PagedKvMemory(geometry, slots=4, context_tokens=8192)
    yield made
    made.close()


def test_a_handle_takes_no_memory_and_writing_takes_what_bytes_for_says(memory):
    before = rss_anon_bytes()
    handle = memory.allocate(1600)
    assert rss_anon_bytes() - before < 1 << 20
    for view in views(memory, handle):
        view[:, :1600] = 1.0
    assert rss_anon_bytes() - before == pytest.approx(memory.bytes_for(1600), rel=0.02)


def test_trimming_gives_whole_pages_back_and_keeps_the_tokens_before(memory):
    handle = memory.allocate(1600)
    before = rss_anon_bytes()
    for view in views(memory, handle):
        view[:] = 1.0
    memory.trim(handle, 100)
    assert rss_anon_bytes() - before == pytest.approx(memory.bytes_for(100), abs=1 << 18)
    assert all((view[:, :100] == 1.0).all() for view in views(memory, handle))


def test_freeing_gives_all_pages_back_and_the_next_owner_reads_zeros(memory):
    before = rss_anon_bytes()
    handle = memory.allocate(1600)
    for view in views(memory, handle):
        view[:, :1600] = 1.0
    slot = memory.place(handle)
    memory.free(handle)
    assert rss_anon_bytes() - before < 1 << 20
    again = memory.allocate(1600)
    assert memory.place(again) == slot
    assert not any(view[:, :1600].any() for view in views(memory, again))


def test_changing_places_copies_no_page(memory):
    first, second, third = (memory.allocate(1600) for _ in range(3))
    for handle in (first, second, third):
        for view in views(memory, handle):
            view[:, :1600] = handle
    before = rss_anon_bytes()
    assert memory.arrange([third, second]) == [[third, second]]
    assert [memory.place(h).slot for h in (third, second)] == [0, 1]
    assert abs(rss_anon_bytes() - before) < 1 << 20
    for handle in (first, second, third):
        assert all((view[:, :1600] == handle).all() for view in views(memory, handle))


def test_a_row_is_never_moved_onto_one_that_just_made_way():
    memory = PagedKvMemory(KvGeometry(layers=1, kv_heads=1, head_dim=64, item_bytes=4), 3, 16)
    try:
        first, second, third = handles = [memory.allocate(16) for _ in range(3)]
        for handle in handles:
            write(memory, handle, 0, [handle] * 16)
        for batch in ([third], [second], [third, first]):
            memory.arrange(batch)
        assert len({memory.place(handle) for handle in handles}) == 3
        assert all(holds(memory, handle, [handle] * 16) for handle in handles)
    finally:
        memory.close()


def test_one_slot_more_than_asked_for_lets_all_of_them_be_held(memory):
    handles = [memory.allocate(8192) for _ in range(4)]
    assert None not in handles
    assert memory.allocate(1) is None


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_a_granule_is_whole_pages_and_capacity_whole_granules(head_dim):
    geometry = KvGeometry(layers=2, kv_heads=3, head_dim=head_dim, item_bytes=4)
    memory = PagedKvMemory(geometry, slots=2, context_tokens=1000)
    try:
        assert memory.tokens_per_page * head_dim * 4 % mmap.PAGESIZE == 0
        assert memory.capacity_tokens >= 1000
        assert memory.capacity_tokens % memory.tokens_per_page == 0
        assert memory.bytes_for(1) == memory.tokens_per_page * geometry.bytes_per_token
    finally:
        memory.close()


def test_address_space_that_the_kernel_refuses_is_a_memory_error():
    geometry = KvGeometry(layers=1, kv_heads=1, head_dim=64, item_bytes=4)
    with pytest.raises(MemoryError, match="KV cache"):
        PagedKvMemory(geometry, slots=1, context_tokens=1 << 45)


def mapped_bytes(low: int, high: int) -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(figure, 16) for figure in line.split()[0].split("-"))
        total += max(0, min(end, high) - max(start, low))
    return total


def test_moving_leaves_no_hole_that_another_thread_could_be_given(memory, monkeypatch):
    handles = [memory.allocate(16) for _ in range(4)]
    length = memory._slots * memory._stride
    # To close a hole afterwards would be too late: what moved into it meanwhile would be lost.
    monkeypatch.delattr(paged, "_map")
    for i in range(8):
        memory.arrange([handles[i % 4], handles[(i + 2) % 4]])
        assert all(mapped_bytes(base, base + length) == length for base in memory._bases)
