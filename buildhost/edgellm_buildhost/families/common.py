"""What the families share: the plain decoder of Llama, and the words for how others differ from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgellm_buildhost.architecture import KEY, OUTPUT, QUERY, VALUE, Architecture, AttentionKind
from edgellm_buildhost.checkpoint.rope import rope_settings, rotary_frequencies
from edgellm_buildhost.checkpoint.settings import Settings

FULL, SLIDING = "full_attention", "sliding_attention"
_MOST_LAYERS, _MOST_HEAD_DIM = 1024, 1024
QKV_BIASES = frozenset({QUERY, KEY, VALUE})
ATTENTION_BIASES = QKV_BIASES | {OUTPUT}


def plain_decoder(config: Settings) -> Architecture:
    """The decoder of Llama for these settings: every layer sees all positions, nothing has a bias.

    Raises BuildError naming the field that is missing or does not fit the others.
    """
    layers, head_dim = config.positive("num_hidden_layers", most=_MOST_LAYERS), _head_dim(config)
    heads = config.positive("num_attention_heads")
    kv_heads = config.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    return Architecture(
        family=config.text("model_type"),
        layers=layers,
        hidden_size=config.positive("hidden_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=config.positive("intermediate_size"),
        vocab_size=config.positive("vocab_size"),
        context_length=config.positive("max_position_embeddings", 2048),
        rms_epsilon=config.number("rms_norm_eps", 1e-6),
        tied_embedding=config.flag("tie_word_embeddings"),
        attention=(AttentionKind(rotary_frequencies(config, head_dim)),) * layers,
        attention_scale=head_dim**-0.5,
    )


def whole_heads(config: Settings) -> None:
    """Raises BuildError if only a part of a head should turn, or layers by their type: not these families."""
    config.must_be("partial_rotary_factor", (None, 1.0))
    scaling = rope_settings(config)
    if scaling is not None:
        scaling.must_be("partial_rotary_factor", (None, 1.0))
        for layer_type in (FULL, SLIDING):
            scaling.must_be(layer_type, (None,))


def window(config: Settings, context: int) -> int | None:
    """`sliding_window`, positions; None where it is null or as long as the context."""
    if config.get("sliding_window") is None:
        return None
    size = config.positive("sliding_window")
    return size if size < context else None


def sliding_everywhere(plain: Architecture, config: Settings) -> Architecture:
    """`plain`, with the window of `config` on every layer."""
    size = window(config, plain.context_length)
    return replace(plain, attention=tuple(replace(kind, sliding_window=size) for kind in plain.attention))


def sliding_by_layer(
    config: Settings, full: AttentionKind, sliding: AttentionKind, defaults: Sequence[str]
) -> tuple[AttentionKind, ...]:
    """The kind of each layer by `layer_types`, or by `defaults` where the settings have none."""
    types = config.texts("layer_types") or tuple(defaults)
    if len(types) != len(defaults):
        raise config.error("layer_types", f"has {len(types)} entries for {len(defaults)} layers")
    kinds = {FULL: full, SLIDING: sliding}
    unknown = set(types) - set(kinds)
    if unknown:
        raise config.error(
            "layer_types",
            f"{min(unknown)!r} is not supported",
            f"supported: {', '.join(kinds)}; choose another model",
        )
    return tuple(kinds[kind] for kind in types)


def _head_dim(config: Settings) -> int:
    hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise config.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    head_dim = config.positive("head_dim", hidden // heads, most=_MOST_HEAD_DIM)
    if head_dim < 2 or head_dim % 2 or head_dim > _MOST_HEAD_DIM:
        raise config.error(
            "head_dim", f"{head_dim} should be even, for channels turn in pairs, and not above 1024"
        )
    return head_dim
