"""Rotary positions: from a model's settings to the angular steps that the graph bakes in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.settings import Settings

_THETA = 10000.0  # what a configuration without rope_theta means
_PLAIN_CONTEXT = "choose a checkpoint with one of these, or one trained for its context without scaling"


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def plain_frequencies(theta: float, rotary_dim: int) -> NDArray[np.float64]:
    """`theta ** (-2i / rotary_dim)` for each pair i of the channels that turn, radians per position."""
    return np.asarray(theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim))


def llama3_frequencies(plain: NDArray[np.float64], scaling: Llama3Scaling) -> NDArray[np.float64]:
    """The plain frequencies scaled as Llama 3.1 was trained."""
    wavelength = 2.0 * math.pi / plain
    turns = scaling.original_context / wavelength
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return np.asarray(keep * plain + (1.0 - keep) * plain / scaling.factor)


def scaled_frequencies(theta: float, rotary_dim: int, scaling: Settings | None) -> tuple[float, ...]:
    """Frequencies for the `rope_scaling` object of a configuration (None: unscaled).

    Raises BuildError for a type other than default, linear and llama3.
    """
    plain = plain_frequencies(theta, rotary_dim)
    kind = "default" if scaling is None else rope_type(scaling)
    if scaling is None or kind == "default":
        return tuple(plain.tolist())
    if kind == "linear":
        return tuple((plain / scaling.number("factor")).tolist())
    if kind == "llama3":
        return tuple(llama3_frequencies(plain, _llama3(scaling)).tolist())
    raise scaling.error(
        "rope_type",
        f"{kind!r} is not supported (default, linear and llama3 are)",
        _PLAIN_CONTEXT,
    )


def rope_type(scaling: Settings) -> str:
    """The kind of scaling, by either of the names that it goes by."""
    for field in ("rope_type", "type"):
        if scaling.get(field) is not None:
            return scaling.text(field)
    return "default"


def rope_settings(config: Settings) -> Settings | None:
    """The object with the scaling: `rope_parameters` since transformers 5, `rope_scaling` before."""
    return config.section("rope_scaling") or config.section("rope_parameters")


def rotary_frequencies(config: Settings, head_dim: int) -> tuple[float, ...]:
    """Angular steps for the channel pairs of a head, or for its first ones where only a part turns.

    transformers 5 keeps `rope_theta` and `partial_rotary_factor` with the scaling; before, they stood alone.
    """
    scaling = rope_settings(config)
    inner = Settings(config.path, {}) if scaling is None else scaling
    theta, share = inner.optional_number("rope_theta"), inner.optional_number("partial_rotary_factor")
    theta = config.number("rope_theta", _THETA) if theta is None else theta
    share = config.number("partial_rotary_factor", 1.0) if share is None else share
    rotary_dim = int(head_dim * share)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise config.error(
            "partial_rotary_factor",
            f"{share} makes {rotary_dim} of {head_dim} channels turn, which cannot be",
        )
    return scaled_frequencies(theta, rotary_dim, scaling)


def _llama3(scaling: Settings) -> Llama3Scaling:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.error("high_freq_factor", f"{high} should be above low_freq_factor {low}")
    return Llama3Scaling(
        factor=scaling.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=scaling.positive("original_max_position_embeddings"),
    )
