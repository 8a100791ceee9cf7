"""Qwen2 and Qwen2.5: biases on query, key and value; a sliding window on the upper layers, if at all."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import (
    FULL,
    QKV_BIASES,
    SLIDING,
    plain_decoder,
    sliding_by_layer,
    whole_heads,
    window,
)

MODEL_TYPES: tuple[str, ...] = ("qwen2",)
_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}


def architecture(config: Settings) -> Architecture:
    """The decoder of Qwen2."""
    return replace(qwen_decoder(config), biases=QKV_BIASES)


def qwen_decoder(config: Settings) -> Architecture:
    """What Qwen2 and Qwen3 share: a window from layer `max_window_layers` on, if `use_sliding_window`."""
    config = config.with_defaults(_DEFAULTS)
    config.must_be("hidden_act", ("silu",))
    whole_heads(config)
    plain = plain_decoder(config)
    full = plain.attention[0]
    size = window(config, plain.context_length) if config.flag("use_sliding_window") else None
    if size is None:
        return plain
    first = config.get("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise config.wrong("max_window_layers", "a number of layers")
    types = [SLIDING if layer >= first else FULL for layer in range(plain.layers)]
    sliding = replace(full, sliding_window=size)
    return replace(plain, attention=sliding_by_layer(config, full, sliding, types))
