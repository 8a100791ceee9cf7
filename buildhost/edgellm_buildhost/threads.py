"""How many threads numpy's products use."""

from __future__ import annotations

from threadpoolctl import threadpool_limits

# OpenBLAS's threads wait for each other in a loop. Products of small matrices are over before that pays, and
# on a machine that does other work too the waiting costs most of the time. SmolLM2-135M (widths 576, 1,536),
# two shared cores, seconds for a layer with two threads and with one: statistics 3.2 and 1.8, AWQ 4.6 to 73
# and 1.1, GPTQ 1.2 and 0.45.
_SMALL_WIDTH = 2048


def limited_for(width: int) -> threadpool_limits:
    """A context in which products for layers of that hidden size use one thread, or all for large ones."""
    return threadpool_limits(limits=1 if width < _SMALL_WIDTH else None, user_api="blas")
