"""A decoder layer in numpy, as plain as can be: the function that a method may not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgellm_buildhost.architecture import (
    DOWN,
    GATE,
    KEY,
    KEY_NORM,
    OUTPUT,
    QUERY,
    QUERY_NORM,
    UP,
    VALUE,
    Activation,
    Architecture,
)
from edgellm_buildhost.quantization.layer import FloatLayer, InputStatistics, Point


@dataclass(frozen=True)
class Forward:
    """The new residual stream, `[tokens, hidden]`, and what entered the linears at each point."""

    hidden: np.ndarray
    inputs: Mapping[Point, np.ndarray]

    def statistics(self) -> dict[Point, InputStatistics]:
        return {point: statistics_of(seen) for point, seen in self.inputs.items()}


def statistics_of(inputs: np.ndarray) -> InputStatistics:
    """Of the vectors `[tokens, in]`."""
    seen = inputs.astype(np.float32)
    return InputStatistics(
        len(seen), seen.T @ seen / np.float32(len(seen)), np.abs(seen).mean(axis=0), np.abs(seen).max(axis=0)
    )


def forward(architecture: Architecture, layer: int, weights: FloatLayer, hidden: np.ndarray) -> Forward:
    """One layer over one text from its first position on; in the precision of `hidden`."""
    norms, vectors = architecture.norms, weights.vectors

    def linear(part: str, x: np.ndarray) -> np.ndarray:
        product = x @ weights.linears[part].T.astype(x.dtype)
        return product + vectors[f"{part}.bias"] if part in architecture.biases else product

    def norm(part: str | None, x: np.ndarray) -> np.ndarray:
        return x if part is None else _norm(architecture, x, vectors[f"{part}.weight"])

    x = norm(norms.attention, hidden)
    query, key, value = (_heads(architecture, linear(part, x)) for part in (QUERY, KEY, VALUE))
    if architecture.qk_norm:
        query, key = norm(QUERY_NORM, query), norm(KEY_NORM, key)
    attended = _attention(architecture, layer, query, key, value)
    between = hidden + norm(norms.attention_output, linear(OUTPUT, attended))
    y = norm(norms.ffn, between)
    gated = _activation(architecture, linear(GATE, y)) * linear(UP, y)
    after = between + norm(norms.ffn_output, linear(DOWN, gated))
    inputs = (x, attended, y, gated)
    return Forward(after, dict(zip(Point, inputs, strict=True)))


def _norm(architecture: Architecture, x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + architecture.rms_epsilon) * gain


def _heads(architecture: Architecture, x: np.ndarray) -> np.ndarray:
    """`[heads, tokens, head_dim]`."""
    return x.reshape(len(x), -1, architecture.head_dim).swapaxes(0, 1)


def _attention(
    architecture: Architecture, layer: int, query: np.ndarray, key: np.ndarray, value: np.ndarray
) -> np.ndarray:
    kind = architecture.attention[layer]
    query, key = (_turned(kind.inverse_frequencies, x) for x in (query, key))
    readers = architecture.heads // architecture.kv_heads
    key, value = np.repeat(key, readers, axis=0), np.repeat(value, readers, axis=0)
    scores = query @ key.swapaxes(1, 2) * architecture.attention_scale
    if architecture.attention_softcap:
        scores = architecture.attention_softcap * np.tanh(scores / architecture.attention_softcap)
    distance = np.arange(scores.shape[1])[:, None] - np.arange(scores.shape[1])
    hidden = (distance < 0) | (distance >= (kind.sliding_window or len(distance)))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
    return mixed.swapaxes(0, 1).reshape(scores.shape[1], -1)


def _turned(frequencies: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    half = len(frequencies)
    angles = np.arange(x.shape[1])[:, None] * np.array(frequencies)
    cosine, sine = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def _activation(architecture: Architecture, x: np.ndarray) -> np.ndarray:
    if architecture.activation is Activation.SILU:
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
