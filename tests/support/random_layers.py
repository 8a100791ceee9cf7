"""Random decoder layers of every shape that the architecture knows, and inputs with a few loud channels."""

from __future__ import annotations

import numpy as np

from edgellm_buildhost.architecture import (
    DOWN,
    KEY,
    LINEARS,
    QUERY,
    UP,
    VALUE,
    Activation,
    Architecture,
    AttentionKind,
    Norms,
)
from edgellm_buildhost.quantization.layer import FloatLayer, Point, Statistics
from tests.support.numpy_layer import forward, statistics_of

_FREQUENCIES = tuple(10000.0 ** (-np.arange(8) / 8))


def plain_architecture(**changes: object) -> Architecture:
    """64 wide, 4 query heads over 2 key-value heads of 16."""
    figures: dict[str, object] = {
        "family": "llama",
        "layers": 2,
        "hidden_size": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn_size": 96,
        "vocab_size": 128,
        "context_length": 256,
        "rms_epsilon": 1e-5,
        "tied_embedding": True,
        "attention": (AttentionKind(_FREQUENCIES),) * 2,
        "attention_scale": 0.25,
    }
    return Architecture(**(figures | changes))  # type: ignore[arg-type]


ARCHITECTURES = {
    "llama": plain_architecture(),
    "as many key-value heads as heads": plain_architecture(kv_heads=4),
    "one key-value head": plain_architecture(kv_heads=1, head_dim=32),
    "biases": plain_architecture(biases=frozenset({QUERY, KEY, VALUE, UP, DOWN})),
    "norms of queries and keys": plain_architecture(qk_norm=True),
    "norms behind, gelu, window, softcap": plain_architecture(
        norms=Norms(
            ffn="pre_feedforward_layernorm",
            attention_output="post_attention_layernorm",
            ffn_output="post_feedforward_layernorm",
        ),
        activation=Activation.GELU_TANH,
        attention=(AttentionKind(_FREQUENCIES, sliding_window=5),) * 2,
        attention_softcap=30.0,
    ),
}


def random_layer(architecture: Architecture, seed: int = 0) -> FloatLayer:
    rng = np.random.default_rng(seed)
    linears = {
        part: (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        for part, shape in ((part, architecture.linear_shape(part)) for part in LINEARS)
    }
    vectors = {
        name: rng.uniform(0.5, 1.5, length).astype(np.float32)
        for name, length in architecture.vectors().items()
    }
    return FloatLayer(linears, vectors)


def loud_inputs(tokens: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors `[tokens, width]` that are correlated, with a few channels much larger than the rest."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, width)) @ rng.standard_normal((width, width)) / np.sqrt(width)
    return (mixed * np.exp(rng.standard_normal(width) * 1.2)).astype(np.float32)


def random_statistics(architecture: Architecture, weights: FloatLayer, seed: int = 0) -> Statistics:
    """Of a text of random vectors: what enters the linears when they run through the layer."""
    hidden = loud_inputs(400, architecture.hidden_size, seed)
    return {
        point: statistics_of(seen) for point, seen in forward(architecture, 0, weights, hidden).inputs.items()
    }


def outputs_error(a: np.ndarray, b: np.ndarray) -> float:
    """Energy of the difference, relative to that of `b`."""
    return float(np.square(a - b).sum() / np.square(b).sum())


def point_width(architecture: Architecture, point: Point) -> int:
    return {
        Point.ATTENTION: architecture.hidden_size,
        Point.ATTENTION_OUTPUT: architecture.query_size,
        Point.FFN: architecture.hidden_size,
        Point.FFN_OUTPUT: architecture.ffn_size,
    }[point]
