"""Gemma 3, its text: five sliding layers, with angles of their own, to one that sees everything."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import Architecture, AttentionKind
from edgellm_buildhost.checkpoint.rope import rotary_frequencies
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import FULL, SLIDING, sliding_by_layer, window
from edgellm_buildhost.families.gemma2 import gemma_decoder

MODEL_TYPES: tuple[str, ...] = ("gemma3_text", "gemma3")
# Published text_config objects leave out whatever transformers has as a default.
_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
}
_MULTIMODAL_PREFIX = "language_model."


def architecture(config: Settings) -> Architecture:
    """The decoder of Gemma 3; of a multimodal checkpoint, the language model alone."""
    multimodal = config.get("model_type") == "gemma3"
    if multimodal:
        config = _language_model(config)
    config = config.with_defaults(_DEFAULTS)
    config.must_be("attn_logit_softcapping", (None,))
    plain = gemma_decoder(_rope_of(config, FULL))
    steps = rotary_frequencies(_rope_of(config, SLIDING), plain.head_dim)
    sliding = AttentionKind(steps, window(config, plain.context_length))
    pattern = config.positive("sliding_window_pattern")
    types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(plain.layers)]
    return replace(
        plain,
        attention=sliding_by_layer(config, plain.attention[0], sliding, types),
        qk_norm=True,
        storage=replace(plain.storage, prefix=_MULTIMODAL_PREFIX if multimodal else ""),
    )


def _language_model(config: Settings) -> Settings:
    text = config.section("text_config")
    if text is None:
        raise config.wrong("text_config", "the settings of the language model")
    tied = config.get("tie_word_embeddings")
    return text.with_defaults(
        {"model_type": "gemma3_text"} | ({} if tied is None else {"tie_word_embeddings": tied})
    )


def _rope_of(config: Settings, layer_type: str) -> Settings:
    """The settings as if all layers were of that type.

    transformers 5 has an object for each type in `rope_parameters`; before, the angles of sliding layers had
    `rope_local_base_freq`, and `rope_scaling` was for the others alone.
    """
    both = config.section("rope_parameters")
    own = None if both is None else both.get(layer_type)
    if layer_type == FULL:
        return config.with_fields({"rope_parameters": own})
    theta = config.get("rope_local_base_freq")
    return config.with_fields({"rope_parameters": own, "rope_scaling": None, "rope_theta": theta})
