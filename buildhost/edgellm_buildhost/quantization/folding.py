"""Moves scales of channels between neighbours, so that the function of a layer stays the same.

Dividing the input of a linear map by `s`, channel by channel, and multiplying its columns by `s` changes
nothing. What makes the input takes the division in, so nothing is left to do at run time:

| point            | divided                                                                     |
|------------------|-----------------------------------------------------------------------------|
| attention        | gain of the norm before attention                                           |
| attention_output | rows of v, and its bias: attention is linear in v, head by head             |
| ffn              | gain of the norm before feed-forward                                        |
| ffn_output       | rows of up, and its bias: `act(gate) * up` is linear in up, whatever act is |

This holds for every family of `Architecture`: norms of queries and keys stand behind q and k, whose rows are
never touched, and norms behind attention and feed-forward see the outputs, which do not change. Rounding in
groups along a row commutes with a scale of the whole row, so the four points do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import UP, VALUE, Architecture
from edgellm_buildhost.quantization.layer import READERS, FloatLayer, InputStatistics, Point

Floats = NDArray[np.float32]


def fold(architecture: Architecture, weights: FloatLayer, scales: Mapping[Point, Floats]) -> FloatLayer:
    """The same layer with the input at each point of `scales` divided by them, `[in]`, all positive.

    Scales of attention_output are `shared` by the query heads that read one key-value head.
    """
    linears, vectors = dict(weights.linears), dict(weights.vectors)
    for point, by in scales.items():
        for part in READERS[point]:
            linears[part] = linears[part] * by
    gains = {Point.ATTENTION: architecture.norms.attention, Point.FFN: architecture.norms.ffn}
    for point, norm in gains.items():
        if point in scales:
            vectors[f"{norm}.weight"] = vectors[f"{norm}.weight"] / scales[point]
    divisors = {}
    if Point.ATTENTION_OUTPUT in scales:
        divisors[VALUE] = _by_value_channel(architecture, scales[Point.ATTENTION_OUTPUT])[:, 0].reshape(-1)
    if Point.FFN_OUTPUT in scales:
        divisors[UP] = scales[Point.FFN_OUTPUT]
    for part, by in divisors.items():
        linears[part] = linears[part] / by[:, None]
        if part in architecture.biases:
            vectors[f"{part}.bias"] = vectors[f"{part}.bias"] / by
    return FloatLayer(linears, vectors)


def shared(
    architecture: Architecture, point: Point, figures: Floats, combine: Callable[..., Floats] = np.mean
) -> Floats:
    """`figures` of the channels at `point`, combined over those channels that can only have one scale."""
    if point is not Point.ATTENTION_OUTPUT or architecture.heads == architecture.kv_heads:
        return figures
    by_head = _by_value_channel(architecture, figures)
    common = combine(by_head, axis=1, keepdims=True)
    return np.ascontiguousarray(np.broadcast_to(common, by_head.shape)).reshape(-1)


def rescaled(statistics: InputStatistics, by: Floats) -> InputStatistics:
    """The statistics of the input divided by `by`."""
    inverse = np.float32(1.0) / by
    return InputStatistics(
        tokens=statistics.tokens,
        gram=statistics.gram * inverse[:, None] * inverse,
        mean_abs=statistics.mean_abs * inverse,
        max_abs=statistics.max_abs * inverse,
    )


def _by_value_channel(architecture: Architecture, figures: Floats) -> Floats:
    """`[kv_heads, query heads of each, head_dim]`."""
    return figures.reshape(architecture.kv_heads, -1, architecture.head_dim)
