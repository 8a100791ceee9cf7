"""How fast this machine's memory can be read: the bound that a decode step runs into."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Far more than any cache that a build host or a board has, all threads together.
_BYTES = 256 << 20
_ROUNDS = 5


def read_bytes_per_s(threads: int) -> float:
    """Best of a few rounds in which `threads` threads each read a part of 256 MiB once.

    Finding the largest of 64-bit integers is the cheapest work that touches every byte; numpy lets the other
    threads run meanwhile.
    """
    parts = [np.ones(_BYTES // threads // 8, np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best_s = min(_round_s(pool, parts) for _ in range(_ROUNDS))
    return sum(part.nbytes for part in parts) / best_s


def _round_s(pool: ThreadPoolExecutor, parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> float:
    began = time.perf_counter()
    list(pool.map(np.max, parts))
    return time.perf_counter() - began
