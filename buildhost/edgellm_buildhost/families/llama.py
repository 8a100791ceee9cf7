"""Llama 2 and 3, and what was built like them, as SmolLM2."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import DOWN, GATE, UP, Architecture
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import ATTENTION_BIASES, plain_decoder, whole_heads

MODEL_TYPES: tuple[str, ...] = ("llama",)


def architecture(config: Settings) -> Architecture:
    """The plain decoder, with biases where the settings say so."""
    config.must_be("hidden_act", ("silu",))
    whole_heads(config)
    biases: frozenset[str] = frozenset()
    if config.flag("attention_bias"):
        biases |= ATTENTION_BIASES
    if config.flag("mlp_bias"):
        biases |= {GATE, UP, DOWN}
    return replace(plain_decoder(config), biases=biases)
