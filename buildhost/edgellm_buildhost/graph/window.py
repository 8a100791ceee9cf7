"""A sliding window as a bias on the scores: versions of ONNX Runtime disagree on `local_window_size`.

1.23 shows a token that many positions before it; from 1.24 on the token is itself one of them, as models
count. A bias means the same to all. It costs a value for each pair of query and key, and the kernels of newer
versions skip what is hidden: so only the graph that every version can read has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

AddNode = Callable[..., ir.Value]
Constant = Callable[[str, NDArray[Any]], ir.Value]


def window_bias(
    add: AddNode, constant: Constant, lengths: tuple[ir.Value, ir.Value, ir.Value], window: int
) -> ir.Value:
    """Minus infinity where a key lies `window` or more positions before a query, else 0: [B, 1, S, longest].

    `lengths` are `past_len` and `query_len`, int32 [B], and the longest of their sums, int32 []; all rows
    have S = `query_len` tokens.
    """
    past, query, longest = lengths
    name = f"window{window}"

    def small(key: str, value: object, dtype: type[np.generic]) -> ir.Value:
        return constant(f"window.{key}", np.array(value, dtype))

    zero, one, size = (small(str(number), number, np.int32) for number in (0, 1, window))
    tokens = add("ReduceMax", [query], {"keepdims": 0}, name=f"{name}.tokens")
    ahead = add("Range", [zero, tokens, one], name=f"{name}.ahead")
    rows = add("Unsqueeze", [ahead, small("inner", [1], np.int64)], name=f"{name}.rows")
    starts = add("Unsqueeze", [past, small("outer", [1, 2, 3], np.int64)], name=f"{name}.starts")
    queries = add("Add", [starts, rows], name=f"{name}.queries")
    keys = add("Range", [zero, longest, one], name=f"{name}.keys")
    distance = add("Sub", [queries, keys], name=f"{name}.distance")
    behind = add("GreaterOrEqual", [distance, size], name=f"{name}.behind")
    scores = (small("hidden", -np.inf, np.float32), small("seen", 0.0, np.float32))
    return add("Where", [behind, *scores], name=name)
