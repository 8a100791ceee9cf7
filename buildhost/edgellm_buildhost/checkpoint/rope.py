"""Rotary positions: from a model's settings to the angular steps that the graph bakes in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.errors import BuildError


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def plain_frequencies(theta: float, head_dim: int) -> NDArray[np.float64]:
    """`theta ** (-2i / head_dim)` for each pair i of a head, radians per position."""
    return np.asarray(theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


def llama3_frequencies(plain: NDArray[np.float64], scaling: Llama3Scaling) -> NDArray[np.float64]:
    """The plain frequencies scaled as Llama 3.1 was trained."""
    wavelength = 2.0 * math.pi / plain
    turns = scaling.original_context / wavelength
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return np.asarray(keep * plain + (1.0 - keep) * plain / scaling.factor)


def scaled_frequencies(theta: float, head_dim: int, scaling: dict[str, object] | None) -> tuple[float, ...]:
    """Frequencies for the `rope_scaling` object of a Hugging Face configuration (None: unscaled).

    Raises BuildError for a type other than default, linear and llama3.
    """
    plain = plain_frequencies(theta, head_dim)
    kind = str((scaling or {}).get("rope_type", (scaling or {}).get("type", "default")))
    if scaling is None or kind == "default":
        return tuple(plain.tolist())
    if kind == "linear":
        return tuple((plain / _number(scaling, "factor")).tolist())
    if kind == "llama3":
        llama3 = Llama3Scaling(
            factor=_number(scaling, "factor"),
            low_freq_factor=_number(scaling, "low_freq_factor"),
            high_freq_factor=_number(scaling, "high_freq_factor"),
            original_context=int(_number(scaling, "original_max_position_embeddings")),
        )
        return tuple(llama3_frequencies(plain, llama3).tolist())
    raise BuildError(
        f"config.json: rope type {kind!r} is not supported (default, linear and llama3 are)",
        "choose a checkpoint with one of these, or one trained for its context length without scaling",
    )


def _number(scaling: dict[str, object], field: str) -> float:
    value = scaling.get(field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise BuildError(
            f"config.json: rope_scaling.{field} should be a positive number, found {value!r}",
            "fetch config.json again from where the model was published",
        )
    return float(value)
