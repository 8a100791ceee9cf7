"""The contract of a quantized checkpoint: what the compilers of all runtimes read."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.quantization.layer import Linear


class QuantizedCheckpoint(ABC):
    """A directory of quantized weights. Names are ours; nothing that was handed out is kept.

    `scheme` says in words that a person can compare how the linears are stored, as in
    "int4, symmetric, groups of 64, awq".
    """

    name: str
    architecture: Architecture
    tokenizer: TokenizerFiles
    scheme: str

    @abstractmethod
    def linear(self, layer: int, part: str) -> Linear:
        """A linear map of a layer, `part` one of `LINEARS`; raises BuildError when missing or damaged."""

    @abstractmethod
    def vector(self, name: str) -> NDArray[np.float32]:
        """A gain or a bias by its full name, with the family's offset in it; raises BuildError."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of the embedding or the head, which stay floats here; raises BuildError."""
