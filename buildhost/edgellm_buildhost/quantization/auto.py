"""Bytes where they take most from the error, under a bound: smaller groups, finer grids, 8 bits.

Two passes, because only one layer is in memory at a time: `sensitivity` says for each point of a layer what
each way to round it costs and brings, `choose` spends the bytes for all layers, `Mixed` quantizes with that
choice. The choice is for points and not for matrices: q, k and v are one product in the graph, and so are
gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.quantization.awq import Awq
from edgellm_buildhost.quantization.gptq import Gptq
from edgellm_buildhost.quantization.grid import Rounding
from edgellm_buildhost.quantization.inputs import checked
from edgellm_buildhost.quantization.layer import READERS, FloatLayer, Point, QuantizedLayer, Statistics
from edgellm_buildhost.quantization.rtn import RoundToNearest, round_matrix

Place = tuple[int, Point]
"""A layer, and a point of it."""
Choice = Mapping[Place, Rounding]
Size = Callable[[int, int, Rounding], int]
"""Bytes of a matrix of so many rows and columns, in the files that the bound is about."""
Harm = Callable[[FloatLayer], float]
"""How far a layer with other weights is from its float self."""


@dataclass(frozen=True)
class Way:
    """One way to round the linears at a point.

    `error` says how far the layer then is from its float self, in a measure that layers have in common.
    """

    rounding: Rounding
    size_bytes: int
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """The ways to round the linears at one point of one layer."""

    layer: int
    point: Point
    ways: tuple[Way, ...]

    @property
    def place(self) -> Place:
        """Where."""
        return self.layer, self.point

    @property
    def smallest(self) -> Way:
        """What it takes at least."""
        return min(self.ways, key=lambda way: (way.size_bytes, way.error))

    def steps(self) -> Iterator[_Step]:
        """From the smallest way to better ones, what gains most for each byte first (the lower convex hull
        of error over bytes): no step gains more for each byte than the one before it.
        """
        at = self.smallest
        while better := [way for way in self.ways if way.error < at.error and way.size_bytes > at.size_bytes]:
            start = at
            at = max(better, key=lambda way: (_Step(self, start, way).gain_per_byte, way.size_bytes))
            yield _Step(self, start, at)


@dataclass(frozen=True)
class _Step:
    """From one way at a place to a larger and better one."""

    of: Sensitivity
    start: Way
    end: Way

    @property
    def size_bytes(self) -> int:
        return self.end.size_bytes - self.start.size_bytes

    @property
    def gain_per_byte(self) -> float:
        return (self.start.error - self.end.error) / self.size_bytes


def sensitivity(
    architecture: Architecture,
    layer: int,
    weights: FloatLayer,
    statistics: Statistics | None,
    *,
    roundings: Sequence[Rounding],
    size: Size,
    harm: Harm,
) -> list[Sensitivity]:
    """Of each point of a layer: every one of `roundings`, to nearest with a searched clip, all else float.

    GPTQ makes errors smaller, but leaves about the same order. Memory: the layer once more.
    """
    statistics = checked(architecture, layer, statistics)
    found = []
    for point, parts in READERS.items():
        ways = []
        for rounding in roundings:
            linears = dict(weights.linears)
            for part in parts:
                rounded = round_matrix(linears[part], rounding, clip=True, gram=statistics[point].gram)
                linears[part] = rounded.dequantize()
            taken = sum(size(*architecture.linear_shape(part), rounding) for part in parts)
            ways.append(Way(rounding, taken, harm(FloatLayer(linears, weights.vectors))))
        found.append(Sensitivity(layer, point, tuple(ways)))
    return found


def choose(sensitivities: Iterable[Sensitivity], budget_bytes: int) -> dict[Place, Rounding]:
    """How to round at every point, at most `budget_bytes` in all: better where a byte takes most from the
    error.

    More bytes never give a larger sum of errors: whatever a smaller budget fits in behind the first step
    that only a larger one affords is smaller than that step, and gains less for each byte. Raises ValueError
    when the smallest ways take more than the budget.
    """
    points = sorted(sensitivities, key=lambda item: item.place)
    left = budget_bytes - sum(item.smallest.size_bytes for item in points)
    if left < 0:
        raise ValueError(f"the smallest ways take {-left} bytes more than there are")
    chosen = {item.place: item.smallest for item in points}
    steps = [step for item in points for step in item.steps()]
    # Stable: the steps of a point stay in their order.
    for step in sorted(steps, key=lambda step: -step.gain_per_byte):
        place = step.of.place
        if chosen[place] is step.start and step.size_bytes <= left:
            chosen[place] = step.end
            left -= step.size_bytes
    return {place: way.rounding for place, way in chosen.items()}


class Mixed:
    """A method that rounds each point of each layer as a choice says."""

    def __init__(self, method: RoundToNearest | Awq | Gptq, choice: Choice) -> None:
        """`method` with its own rounding replaced by `choice`, which names every point of every layer."""
        self.needs_statistics = method.needs_statistics
        self.sequential = method.sequential
        self._method = method
        self._choice = choice

    def quantize(
        self, architecture: Architecture, layer: int, weights: FloatLayer, statistics: Statistics | None
    ) -> QuantizedLayer:
        """As `Method.quantize`; raises BuildError as the method does."""
        method = replace(self._method, rounding={point: self._choice[layer, point] for point in Point})
        return method.quantize(architecture, layer, weights, statistics)
