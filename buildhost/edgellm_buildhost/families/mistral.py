"""Mistral 7B, Nemo, Small, and Ministral 8B: a sliding window, on all layers or on some."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import (
    SLIDING,
    plain_decoder,
    sliding_by_layer,
    sliding_everywhere,
    whole_heads,
)

MODEL_TYPES: tuple[str, ...] = ("mistral", "ministral")
_DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def architecture(config: Settings) -> Architecture:
    """The plain decoder with a window."""
    config = config.with_defaults(_DEFAULTS)
    config.must_be("hidden_act", ("silu",))
    whole_heads(config)
    plain = sliding_everywhere(plain_decoder(config), config)
    sliding = plain.attention[0]
    full = replace(sliding, sliding_window=None)
    by_layer = replace(plain, attention=sliding_by_layer(config, full, sliding, [SLIDING] * plain.layers))
    if plain.family == "mistral" and by_layer != plain:
        raise config.error(
            "layer_types",
            "names layers without a window, which a model_type of mistral does not have",
            'set "model_type" to "ministral" if that is what the model is',
        )
    return by_layer
