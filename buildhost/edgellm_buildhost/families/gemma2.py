"""Gemma 2: norms before and behind, tanh limits on scores and logits, a window on every other layer."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import Activation, Architecture, Norms, Storage
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import (
    ATTENTION_BIASES,
    FULL,
    SLIDING,
    plain_decoder,
    sliding_by_layer,
    whole_heads,
    window,
)

MODEL_TYPES: tuple[str, ...] = ("gemma2",)
_DEFAULTS = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_NORMS = Norms(
    attention="input_layernorm",
    attention_output="post_attention_layernorm",
    ffn="pre_feedforward_layernorm",
    ffn_output="post_feedforward_layernorm",
)


def architecture(config: Settings) -> Architecture:
    """The decoder of Gemma 2."""
    config = config.with_defaults(_DEFAULTS)
    plain = gemma_decoder(config)
    full = plain.attention[0]
    sliding = replace(full, sliding_window=window(config, plain.context_length))
    types = [FULL if layer % 2 else SLIDING for layer in range(plain.layers)]
    return replace(
        plain,
        attention=sliding_by_layer(config, full, sliding, types),
        attention_softcap=config.optional_number("attn_logit_softcapping"),
    )


def gemma_decoder(config: Settings) -> Architecture:
    """What Gemma 2 and 3 share; every layer sees all positions. Gains are stored less 1."""
    config.must_be("hidden_activation", ("gelu_pytorch_tanh",))
    config.must_be("use_bidirectional_attention", (None, False))
    whole_heads(config)
    plain = plain_decoder(config)
    return replace(
        plain,
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        logit_softcap=config.optional_number("final_logit_softcapping"),
        embedding_scale=plain.hidden_size**0.5,
        activation=Activation.GELU_TANH,
        norms=_NORMS,
        biases=ATTENTION_BIASES if config.flag("attention_bias") else frozenset(),
        storage=Storage(norm_offset=1.0),
    )
