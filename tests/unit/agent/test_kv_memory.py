import ctypes
import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from edgellm_agent.runtimes.base import KvTensor
from edgellm_agent.worker.kv_memory import KvGeometry, KvMemory


def slot_view(tensor: KvTensor, slot: int) -> np.ndarray:
    n = tensor.slot_stride_bytes // 4
    raw = (ctypes.c_float * n).from_address(tensor.address + slot * tensor.slot_stride_bytes)
    return np.ctypeslib.as_array(raw).reshape(tensor.shape[1:])


def rss_anon_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture
def memory():
    made = KvMemory(KvGeometry(layers=4, kv_heads=2, head_dim=64, item_bytes=4), slots=4, context_tokens=8192)
    yield made
    made.close()


def test_reserving_takes_no_memory_and_writing_takes_what_the_geometry_says(memory):
    tokens = 1600
    before = rss_anon_bytes()
    for tensor in memory.keys + memory.values:
        slot_view(tensor, 2)[:, :tokens] = 1.0
    taken = rss_anon_bytes() - before
    assert taken == pytest.approx(memory.geometry.bytes_for(tokens), rel=0.02)


def test_clearing_a_slot_gives_its_pages_back(memory):
    before = rss_anon_bytes()
    for tensor in memory.keys + memory.values:
        slot_view(tensor, 1)[:, :1600] = 1.0
    memory.clear(1)
    assert rss_anon_bytes() - before < 1 << 20
    assert not slot_view(memory.keys[0], 1)[:, :1600].any()


def test_moving_a_slot_keeps_its_content_and_empties_the_source(memory):
    for i, tensor in enumerate(memory.keys + memory.values):
        slot_view(tensor, 3)[:, :40] = i + 1
        slot_view(tensor, 1)[:] = -1  # stays
    memory.move(3, 0)
    for i, tensor in enumerate(memory.keys + memory.values):
        assert (slot_view(tensor, 0)[:, :40] == i + 1).all()
        assert not slot_view(tensor, 3).any()
        assert (slot_view(tensor, 1) == -1).all()


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_a_granule_is_whole_pages_and_capacity_whole_granules(head_dim):
    geometry = KvGeometry(layers=2, kv_heads=3, head_dim=head_dim, item_bytes=4)
    assert geometry.tokens_per_page * head_dim * 4 % mmap.PAGESIZE == 0
    memory = KvMemory(geometry, slots=2, context_tokens=1000)
    try:
        assert memory.capacity >= 1000
        assert memory.capacity % geometry.tokens_per_page == 0
    finally:
        memory.close()


def test_address_space_that_the_kernel_refuses_is_a_memory_error():
    with pytest.raises(MemoryError, match="KV cache"):
        KvMemory(KvGeometry(layers=1, kv_heads=1, head_dim=64, item_bytes=4), slots=1, context_tokens=1 << 45)
