"""GPTQ, after Frantar et al. 2022 (arXiv 2210.17323): a column makes up for the errors of those before it.

The error of a matrix on the text is tr(E H Eᵀ), H the gram of its inputs. With the Cholesky factor H = R Rᵀ,
R upper triangular, it is the sum over columns k of

    R[k,k]² · |e_k + sum over j < k of e_j R[j,k] / R[k,k]|²

so column k is rounded with the sum added to it. This is the paper's update, written without the inverse of H
(the form that Chee et al. 2023, arXiv 2307.13304, show to be equal). Columns are taken in blocks of one
group: the sum over earlier blocks is one matrix product, and the levels of a group are searched on weights
as they are by then. Groups go by importance, and columns within a group too, so that what matters most is
rounded while there is still much to make up with ("act order", but a group stays together).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.clip import (
    Floats,
    Levels,
    empty_tensor,
    search_levels,
    store,
    usual_ladder,
)
from edgellm_buildhost.quantization.grid import QuantizedTensor, Rounding
from edgellm_buildhost.quantization.inputs import RoundingByPoint, checked, rounding_at, rows_of, stacked
from edgellm_buildhost.quantization.layer import (
    READERS,
    FloatLayer,
    Linear,
    QuantizedLayer,
    Statistics,
)

_MOST_DAMP_STEPS = 6
_CHOLESKY_BLOCK = 512


@dataclass(frozen=True)
class Gptq:
    """GPTQ at 4 or 8 bits; `damp` is the part of the mean diagonal that is added to the diagonal of H.

    Memory: the largest point three times (weights, errors, codes) and its gram twice. Scaling channels first,
    as `Awq` does, was tried and gains nothing: what it protects is protected here already.
    """

    rounding: RoundingByPoint
    damp: float = 0.01

    needs_statistics = True
    sequential = True

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """As `Method.quantize`; raises BuildError for missing or damaged statistics."""
        seen = checked(architecture, layer, statistics)
        linears: dict[str, Linear] = {}
        for point in READERS:
            rounding = rounding_at(self.rounding, point)
            rounded = gptq(stacked(weights, point), seen[point].gram, rounding, self.damp)
            linears |= {part: rounded.take_rows(rows) for part, rows in rows_of(weights, point).items()}
        return QuantizedLayer(linears, weights.vectors)


def gptq(weight: Floats, gram: Floats, rounding: Rounding, damp: float = 0.01) -> QuantizedTensor:
    """`weight`, `[rows, columns]`, rounded for inputs with this gram, `[columns, columns]`.

    Raises BuildError where no damping makes a gram positive definite that should be so by its making.
    """
    rows, columns = weight.shape
    rounding = rounding.for_width(columns)
    groups = _groups_in_order(gram.diagonal(), rounding.group_size)
    order = np.concatenate([members for _, members in groups])
    factor = _factor(gram, order, damp)
    result = empty_tensor(rows, columns, rounding)
    errors = np.empty((columns, rows), np.float32)
    start = 0
    for group, members in groups:
        span = slice(start, start + len(members))
        block = np.ascontiguousarray(weight.T[members])
        carried = factor[:start, span].T @ errors[:start]
        inner = np.triu(factor[span, span])
        levels, codes = _round_block(block, carried, inner, errors[span], rounding)
        store(result, slice(None), group, levels, codes[np.argsort(members)])
        start = span.stop
    return result


def _round_block(
    block: Floats, carried: Floats, factor: Floats, errors: Floats, rounding: Rounding
) -> tuple[Levels, Floats]:
    """Levels and codes of one group, `[columns, rows]`; `errors` is filled with what rounding leaves over.

    `carried` is the sum over the blocks before: e_j R[j,k], `[columns, rows]`.
    """
    # The best that this block can do for those before it, were it not rounded.
    wanted = block + np.linalg.solve(factor.T, carried)
    levels = search_levels(wanted, rounding, np.square(factor.diagonal()), usual_ladder(rounding))
    codes = np.empty_like(block)
    for k in range(len(block)):
        inside = factor[:k, k] @ errors[:k]
        codes[k] = levels.codes(block[k] + (carried[k] + inside) / factor[k, k])
        errors[k] = block[k] - levels.values(codes[k])
    return levels, codes


def _groups_in_order(importance: Floats, group_size: int) -> list[tuple[int, NDArray[np.intp]]]:
    """The groups, most important first, each with its columns, most important first."""
    spans = [
        np.arange(start, min(start + group_size, len(importance)))
        for start in range(0, len(importance), group_size)
    ]
    weights = np.array([importance[span].sum() for span in spans])
    inside = [span[np.argsort(-importance[span], kind="stable")] for span in spans]
    return [(int(group), inside[group]) for group in np.argsort(-weights, kind="stable")]


def _factor(gram: Floats, order: NDArray[np.intp], damp: float) -> Floats:
    """R, R Rᵀ = the damped gram with its channels in `order`; what lies below its diagonal means nothing.

    Cholesky factors are lower ones: that of the reversed matrix, reversed, is upper.
    """
    backwards = order[::-1]
    mean = float(gram.diagonal().mean())
    for _ in range(_MOST_DAMP_STEPS):
        damped = gram[np.ix_(backwards, backwards)]
        damped.flat[:: len(damped) + 1] += np.float32(damp * mean if mean > 0 else 1.0)
        try:
            _cholesky_in_place(damped)
            return damped[::-1, ::-1]
        except np.linalg.LinAlgError:
            damp *= 10
    raise BuildError(
        "the gram of a layer's inputs is not positive semidefinite",
        "calibrate again: the statistics are damaged",
    )


def _cholesky_in_place(matrix: Floats) -> None:
    """The lower factor into the lower half of `matrix`; raises LinAlgError where it is not positive definite.

    NumPy's own computes in float64 and copies, which is five times the memory at the width of a 7B model.
    """
    size = len(matrix)
    for start in range(0, size, _CHOLESKY_BLOCK):
        stop = min(start + _CHOLESKY_BLOCK, size)
        corner = np.linalg.cholesky(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = corner
        below = matrix[stop:, start:stop]
        below[:] = np.linalg.solve(corner, below.T).T
        for row in range(stop, size, _CHOLESKY_BLOCK):
            rows = slice(row, min(row + _CHOLESKY_BLOCK, size))
            matrix[rows, stop : rows.stop] -= matrix[rows, start:stop] @ below[: rows.stop - stop].T
