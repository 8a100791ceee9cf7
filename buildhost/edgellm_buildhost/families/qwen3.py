"""Qwen3: norms on the query and key of each head, in place of Qwen2's biases."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import ATTENTION_BIASES
from edgellm_buildhost.families.qwen2 import qwen_decoder

MODEL_TYPES: tuple[str, ...] = ("qwen3",)
_DEFAULTS = {"head_dim": 128}


def architecture(config: Settings) -> Architecture:
    """The decoder of Qwen3."""
    biases = ATTENTION_BIASES if config.flag("attention_bias") else frozenset[str]()
    return replace(qwen_decoder(config.with_defaults(_DEFAULTS)), qk_norm=True, biases=biases)
