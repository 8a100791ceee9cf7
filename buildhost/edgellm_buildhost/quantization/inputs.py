"""What enters a method: the matrices that read at a point, and statistics that are checked before use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import Rounding
from edgellm_buildhost.quantization.layer import READERS, FloatLayer, InputStatistics, Point, Statistics

Floats = NDArray[np.float32]
# A 7B model has 22,016 rows at one point.
_SAMPLED_ROWS = 512

RoundingByPoint = Rounding | Mapping[Point, Rounding]


def rounding_at(rounding: RoundingByPoint, point: Point) -> Rounding:
    """That of the linears that read at `point`: a product over several matrices needs one."""
    return rounding[point] if isinstance(rounding, Mapping) else rounding


def stacked(weights: FloatLayer, point: Point) -> Floats:
    """All matrices that read at `point`, one below the other."""
    matrices = [weights.linears[part] for part in READERS[point]]
    return matrices[0] if len(matrices) == 1 else np.concatenate(matrices)


def sampled_rows(weight: Floats) -> Floats:
    """Rows at even distances, for choices that are common to all rows and change little with more of them."""
    step = -(-len(weight) // _SAMPLED_ROWS)
    return weight[::step]


def rows_of(weights: FloatLayer, point: Point) -> dict[str, slice]:
    """Where each matrix lies in `stacked`."""
    spans, start = {}, 0
    for part in READERS[point]:
        stop = start + len(weights.linears[part])
        spans[part] = slice(start, stop)
        start = stop
    return spans


def checked(architecture: Architecture, layer: int, statistics: Statistics | None) -> Statistics:
    """The statistics, if they are whole and finite; raises BuildError naming layer, point and figure."""
    if statistics is None:
        raise BuildError(
            f"layer {layer}: this method needs statistics of the layer's inputs",
            "calibrate first, or choose a method that needs none (int4, int8)",
        )
    for point in Point:
        found = statistics.get(point)
        if found is None:
            raise _damaged(layer, point, "is missing")
        width = architecture.linear_shape(READERS[point][0])[1]
        _check_point(layer, point, found, width)
    return statistics


def _check_point(layer: int, point: Point, found: InputStatistics, width: int) -> None:
    if found.tokens < 1:
        raise _damaged(layer, point, "has seen no tokens")
    shapes = {"gram": (width, width), "mean_abs": (width,), "max_abs": (width,)}
    for name, shape in shapes.items():
        figures = getattr(found, name)
        if figures.shape != shape:
            raise _damaged(layer, point, f"{name} has shape {list(figures.shape)}, not {list(shape)}")
        if not np.isfinite(figures).all():
            raise _damaged(layer, point, f"{name} holds values that are not finite")


def _damaged(layer: int, point: Point, what: str) -> BuildError:
    return BuildError(
        f"layer {layer}: statistics of point {point.value}: {what}",
        "calibrate again with another text; values that are not finite mean that the float model overflows",
    )
