"""Recipes: which tensor is rounded to which grid. The quality and the speed of an engine are decided here.

INT4 is groups of 32 with a float minimum (`minima` says how a kernel without one computes it), because it
gives weights that were published in this form (GGUF's Q4_1) back exactly, and costs less than a second
product would. INT8 is groups of 64, symmetric: as close as groups of 32, with fewer bytes and faster.
Embedding and head are always 8-bit.

SmolLM2-135M-Instruct, whose published GGUF is Q4_1, in one sitting on two shared cores of an EPYC 9004
(AVX-512 VNNI) with ONNX Runtime 1.32; perplexity on the first 940 tokens of `pydoc_data.topics`, tokens per
second at 1, 4 and 8 rows and in a prefill of 512, MB of weight files. The INT4 rows had a head in groups of
32:

    weights                                   perplexity     1     4     8   prefill    MB
    INT8, groups of 64                             13.18   135   372   483       983   145
    INT4, float minimum in extra columns           13.08   120   318   369       721   107
    INT4, float minimum, a float32 product         13.17    99   307   369       719   114
    INT4, extra columns for qkv and gate/up        13.58   124   319   414       763   105
    INT4, integer zero point                       15.92   147   370   447       834   103

With the head in groups of 64, as built here, the default INT4 has 13.17; the source in float32 has 13.11.
The source lies on a 4-bit grid already, so the order of the INT4 rows says nothing about other checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.base import EMBEDDING, HEAD, Checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantize import Bits, Grid, QuantizedTensor, concatenate, quantize


class PrecisionName(str, Enum):
    """What a user asks for."""

    INT4 = "int4"
    INT8 = "int8"


class KvName(str, Enum):
    """How a user wants keys and values kept.

    The CPU kernel of ONNX Runtime 1.32 takes float16 too, but a decode step of SmolLM2-135M then took 1.7 to
    1.9 times as long as with float32; INT8 is smaller and faster than either.
    """

    FLOAT32 = "float32"
    INT8 = "int8"


@dataclass(frozen=True)
class Recipe:
    """Bits, group size and grid of the linear layers, and group size of the 8-bit embedding and head."""

    bits: Bits
    group_size: int
    grid: Grid
    table_group_size: int = 64

    @property
    def scheme(self) -> str:
        """In words that a person can compare."""
        return f"{self.grid.value}, round to nearest"


RECIPES = {
    PrecisionName.INT4: Recipe(bits=4, group_size=32, grid=Grid.FLOAT_MINIMUM),
    PrecisionName.INT8: Recipe(bits=8, group_size=64, grid=Grid.SYMMETRIC),
}


class QuantizedWeights:
    """The weights of a checkpoint by a recipe; each is read, rounded and forgotten."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        """Take from `checkpoint`; raises BuildError where a shape does not allow the recipe's groups."""
        self._checkpoint = checkpoint
        self._recipe = recipe
        hidden = checkpoint.architecture.hidden_size
        self._table_group_size = next(
            (size for size in (recipe.table_group_size, 32, 16) if hidden % size == 0), 0
        )
        if not self._table_group_size:
            raise BuildError(
                f"{checkpoint.name}: hidden_size {hidden} is no multiple of 16", "choose another model"
            )

    @property
    def table_group_size(self) -> int:
        """Group size of embedding and head: the recipe's, or the next smaller one that divides the
        hidden size.
        """
        return self._table_group_size

    def matrix(self, names: Sequence[str]) -> QuantizedTensor:
        """The matrices of these names, rounded one by one and put below each other."""
        return concatenate([self._rounded(name) for name in names])

    def vector(self, name: str) -> NDArray[np.float32]:
        """A gain, as it is."""
        return self._checkpoint.tensor(name)

    def _rounded(self, name: str) -> QuantizedTensor:
        weight = self._checkpoint.tensor(name)
        if name in {EMBEDDING, HEAD}:
            return quantize(weight, 8, self._table_group_size, Grid.SYMMETRIC)
        grid = self._recipe.grid
        if grid is Grid.FLOAT_MINIMUM and weight.shape[1] % self._recipe.group_size:
            # Group sums need full groups.
            grid = Grid.INTEGER_ZERO
        return quantize(weight, self._recipe.bits, self._recipe.group_size, grid)
