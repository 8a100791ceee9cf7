"""Recipes: which tensor is rounded to which grid. This is where the quality and the speed of an engine
are decided.
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
