"""Phi-3 and Phi-4: fused linears in the files, and heads of which only a part may turn."""

from __future__ import annotations

from dataclasses import replace

from edgellm_buildhost.architecture import GATE, KEY, QUERY, UP, VALUE, Architecture, Storage
from edgellm_buildhost.checkpoint.rope import rope_settings, rope_type
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.families.common import plain_decoder, sliding_everywhere

MODEL_TYPES: tuple[str, ...] = ("phi3",)
_DEFAULTS = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_STORAGE = Storage(fused={"self_attn.qkv_proj": (QUERY, KEY, VALUE), "mlp.gate_up_proj": (GATE, UP)})
_LONG_ROPE = {"longrope", "su", "yarn"}  # three names for one thing in this family


def architecture(config: Settings) -> Architecture:
    """The plain decoder, stored in another form."""
    config = config.with_defaults(_DEFAULTS)
    config.must_be("hidden_act", ("silu",))
    scaling = rope_settings(config)
    if scaling is not None and rope_type(scaling) in _LONG_ROPE:
        raise scaling.error(
            "rope_type",
            "'longrope' is not supported",
            "choose a variant that was trained without it: Phi-3-mini-4k-instruct, "
            "Phi-3-medium-4k-instruct or phi-4",
        )
    return replace(sliding_everywhere(plain_decoder(config), config), storage=_STORAGE)
