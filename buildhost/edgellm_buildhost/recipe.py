"""Recipes: which method rounds the linears of a model to which grid. Quality and speed are decided here.

`int4` is groups of 32 with a float minimum (`graph.minima` says how a kernel without one computes it): it
gives weights that were published in this form (GGUF's Q4_1) back exactly. The calibrated 4-bit methods are
symmetric by default: every runtime takes that, and ModelOpt's layout has a name for it. Embedding and head
are always 8-bit in an engine. docs/quality.md compares them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edgellm_buildhost.architecture import LINEARS, Architecture
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.footprint import group_sum_bytes, stored_bytes
from edgellm_buildhost.graph.sources import unquantized_bytes
from edgellm_buildhost.quantization.awq import Awq
from edgellm_buildhost.quantization.fp8 import Fp8
from edgellm_buildhost.quantization.gptq import Gptq
from edgellm_buildhost.quantization.grid import Bits, Grid, Rounding
from edgellm_buildhost.quantization.layer import Method
from edgellm_buildhost.quantization.rtn import RoundToNearest
from edgellm_buildhost.quantization.smoothquant import SmoothQuant

GROUP_SIZES = (16, 32, 64, 128, 256)
_SMALL_GROUP = 32


class QuantName(str, Enum):
    """What a user asks for."""

    INT4 = "int4"
    INT4_AWQ = "int4-awq"
    INT4_GPTQ = "int4-gptq"
    INT8 = "int8"
    INT8_SMOOTHQUANT = "int8-smoothquant"
    FP8 = "fp8"
    AUTO = "auto"


class GridName(str, Enum):
    """Where the levels of a group lie: a user's words for `Grid`."""

    SYMMETRIC = "symmetric"
    ZERO_POINT = "zero-point"
    MINIMUM = "minimum"

    @property
    def grid(self) -> Grid:
        """The grid."""
        return _GRIDS[self]


_GRIDS = {
    GridName.SYMMETRIC: Grid.SYMMETRIC,
    GridName.ZERO_POINT: Grid.INTEGER_ZERO,
    GridName.MINIMUM: Grid.FLOAT_MINIMUM,
}


class KvName(str, Enum):
    """How a user wants keys and values kept.

    The CPU kernel of ONNX Runtime 1.32 takes float16 too, but a decode step of SmolLM2-135M then took 1.7 to
    1.9 times as long as with float32; INT8 is smaller and faster than either.
    """

    FLOAT32 = "float32"
    INT8 = "int8"


@dataclass(frozen=True)
class Request:
    """What a user asks of a quantization; None is the recipe's own choice.

    `budget_bytes` is for `auto`: what all weights of the engine may take on disk.
    """

    quant: QuantName
    group_size: int | None = None
    grid: GridName | None = None
    budget_bytes: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How the linears of one model are quantized."""

    method: Method
    scheme: str
    """In words that a person can compare."""
    rounding: Rounding | None = None
    """What all linears are rounded to; the smallest, where there is a choice; None: no groups."""
    mixture: Mixture | None = None


@dataclass(frozen=True)
class Mixture:
    """One of `roundings` for each point, so that all linears take at most `linear_bytes` on disk."""

    method: Gptq
    roundings: tuple[Rounding, ...]
    linear_bytes: int


def recipe_for(request: Request, architecture: Architecture) -> Recipe:
    """The recipe for a model; raises BuildError for what does not go together."""
    quant = request.quant
    if (request.budget_bytes is None) is (quant is QuantName.AUTO):
        raise BuildError(
            "--budget-bytes goes with --quant auto, and --quant auto with --budget-bytes",
            "give both: `edgellm plan MODEL` says what fits",
        )
    if quant in {QuantName.INT8_SMOOTHQUANT, QuantName.FP8}:
        return _ungrouped(request)
    if request.budget_bytes is not None:
        return _mixed(request, request.budget_bytes, architecture)
    rounding = _rounding(request, architecture)
    method, words = _grouped_method(quant, rounding)
    return Recipe(method, f"{rounding.grid.value}, {words}", rounding)


def _ungrouped(request: Request) -> Recipe:
    if request.group_size is not None or request.grid is not None:
        raise BuildError(
            f"--quant {request.quant.value} has no groups",
            "leave --group-size and --grid away, or choose int8 or int4-gptq",
        )
    if request.quant is QuantName.FP8:
        return Recipe(Fp8(), "fp8 e4m3, one scale for linears that read the same inputs")
    return Recipe(SmoothQuant(), "symmetric, one scale a row, smoothquant")


def _grouped_method(quant: QuantName, rounding: Rounding) -> tuple[Method, str]:
    if quant is QuantName.INT8:
        return RoundToNearest(rounding, clip=False), "round to nearest"
    if quant is QuantName.INT4:
        return RoundToNearest(rounding), "round to nearest, searched clip"
    if quant is QuantName.INT4_AWQ:
        return Awq(rounding), "awq"
    return Gptq(rounding), "gptq"


def _mixed(request: Request, budget_bytes: int, architecture: Architecture) -> Recipe:
    """4 bits in groups as large as usual, then in small ones and on closer grids, then 8 bits."""
    first = _rounding(request, architecture)
    small = _SMALL_GROUP if request.group_size is None else first.group_size
    sizes = [size for size in (small,) if size in _fitting_sizes(architecture)]
    grids = [request.grid.grid] if request.grid else list(Grid)
    finer = [Rounding(4, size, grid) for size in sizes for grid in grids]
    roundings = tuple(dict.fromkeys((first, *finer, _rounding(Request(QuantName.INT8), architecture))))
    least = architecture.layers * sum(
        stored_bytes(*architecture.linear_shape(part), first) for part in LINEARS
    )
    left = budget_bytes - unquantized_bytes(architecture)
    sums = sum(group_sum_bytes(architecture, rounding) for rounding in roundings)
    if left < least + sums and first.grid is not Grid.FLOAT_MINIMUM:
        # Too little for what float minima need beside the matrices.
        roundings, sums = tuple(r for r in roundings if r.grid is not Grid.FLOAT_MINIMUM), 0
    missing = least + sums - left
    if missing > 0:
        raise BuildError(
            f"--budget-bytes {budget_bytes:,} is {missing:,} bytes too little",
            f"give at least {budget_bytes + missing:,}, or larger groups (--group-size)",
        )
    words = "gptq, closer grids and 8 bits where they matter"
    return Recipe(Gptq(first), words, first, Mixture(Gptq(first), roundings, left - sums))


def _rounding(request: Request, architecture: Architecture) -> Rounding:
    grid = request.grid.grid if request.grid else _default_grid(request.quant)
    bits: Bits = 8 if request.quant is QuantName.INT8 else 4
    return Rounding(bits, _group_size(request, grid, architecture), grid)


def _default_grid(quant: QuantName) -> Grid:
    return Grid.FLOAT_MINIMUM if quant is QuantName.INT4 else Grid.SYMMETRIC


def _group_size(request: Request, grid: Grid, architecture: Architecture) -> int:
    """The size asked for, or the largest usual one; it divides the input widths of all linears."""
    widths, fitting = _widths(architecture), _fitting_sizes(architecture)
    asked = request.group_size
    if asked is not None and asked not in fitting:
        raise BuildError(
            f"--group-size {asked} does not divide the widths {', '.join(map(str, sorted(widths)))}",
            f"choose one of {', '.join(map(str, fitting))}" if fitting else "choose another model",
        )
    if not fitting:
        raise BuildError(
            f"no group size divides the widths {', '.join(map(str, sorted(widths)))}", "choose another model"
        )
    return asked or max(size for size in fitting if size <= max(_usual_size(request.quant, grid), fitting[0]))


def _widths(architecture: Architecture) -> set[int]:
    return {architecture.linear_shape(part)[1] for part in LINEARS}


def _fitting_sizes(architecture: Architecture) -> list[int]:
    widths = _widths(architecture)
    return [size for size in GROUP_SIZES if not any(width % size for width in widths)]


def _usual_size(quant: QuantName, grid: Grid) -> int:
    if quant is QuantName.INT8:
        return 64  # as close as groups of 32, with fewer bytes and faster
    return _SMALL_GROUP if grid is Grid.FLOAT_MINIMUM else 128
