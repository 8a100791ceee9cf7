"""Integers of 4 or 8 bits in 32-bit words, as AWQ, GPTQ and compressed-tensors store them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.quantization.grid import Bits

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in the i-th four bits of a word, from the lowest up."""


def per_word(bits: Bits) -> int:
    """Integers in a word."""
    return 32 // bits


def unpack_last(words: NDArray[Any], bits: Bits, order: tuple[int, ...] = IN_ORDER) -> NDArray[np.uint8]:
    """The integers of int32 `[..., words]` along the last axis, uint8 `[..., words * per_word]`."""
    count = per_word(bits)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    values = np.empty((*words.shape, count), np.uint8)
    for position in range(count):
        values[..., order[position]] = (unsigned >> np.uint32(bits * position)) & np.uint32((1 << bits) - 1)
    return values.reshape(*words.shape[:-1], -1)


def unpack_first(words: NDArray[Any], bits: Bits) -> NDArray[np.uint8]:
    """The integers of int32 `[words, columns]` along the first axis, uint8 `[words * per_word, columns]`."""
    return np.asarray(unpack_last(np.ascontiguousarray(words.T), bits).T)
