"""A decoder of the Llama family, written once for all runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.base import EMBEDDING, FINAL_NORM, HEAD, Architecture, layer_tensor
from edgellm_buildhost.graph.dialect import Dialect
from edgellm_buildhost.quantize import QuantizedTensor


class Weights(Protocol):
    """Where the decoder takes its weights from, in the order of the computation."""

    def matrix(self, names: Sequence[str]) -> QuantizedTensor:
        """The quantized matrices of these names, one below the other."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A gain, as it is."""


def write_decoder(
    architecture: Architecture, weights: Weights, dialect: Dialect, progress: Callable[[int, int], None]
) -> None:
    """Say the whole decoder in `dialect`; `progress` is told layers done, and all."""
    hidden = dialect.embedding(weights.matrix([EMBEDDING]))
    update = None
    for layer in range(architecture.layers):
        gain = weights.vector(layer_tensor(layer, "input_layernorm"))
        if update is None:
            x = dialect.norm(hidden, gain, f"layer{layer}.attention_norm")
        else:
            x, hidden = dialect.add_norm(update, hidden, gain, f"layer{layer}.attention_norm")
        qkv = [layer_tensor(layer, f"self_attn.{part}_proj") for part in "qkv"]
        x = dialect.linear(x, weights.matrix(qkv), f"layer{layer}.qkv")
        x = dialect.attention(x, layer)
        x = dialect.linear(
            x, weights.matrix([layer_tensor(layer, "self_attn.o_proj")]), f"layer{layer}.attention_out"
        )

        gain = weights.vector(layer_tensor(layer, "post_attention_layernorm"))
        x, hidden = dialect.add_norm(x, hidden, gain, f"layer{layer}.ffn_norm")
        gate_up = [layer_tensor(layer, f"mlp.{part}_proj") for part in ("gate", "up")]
        x = dialect.linear(x, weights.matrix(gate_up), f"layer{layer}.gate_up")
        x = dialect.gated(x, f"layer{layer}.gated")
        update = dialect.linear(
            x, weights.matrix([layer_tensor(layer, "mlp.down_proj")]), f"layer{layer}.down"
        )
        progress(layer + 1, architecture.layers)
    if update is None:
        raise ValueError("a decoder has at least one layer")
    head = None if architecture.tied_embedding else weights.matrix([HEAD])
    dialect.head(update, hidden, weights.vector(FINAL_NORM), head)
