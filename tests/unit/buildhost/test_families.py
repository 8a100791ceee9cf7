"""config.json to architecture: published configurations are understood, and others refused by field."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_buildhost.architecture import DOWN, GATE, OUTPUT, QUERY, UP, Architecture, tensor_shapes
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.families import MODEL_TYPES, read_architecture
from tests.support.tiny_families import CONFIGS

Config = dict[str, Any]
CONFIG = Path("model/config.json")


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


SILU = {"hidden_act": "silu"}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
# What the publishers' config.json say of sizes, with the number of weights that they publish.
PUBLISHED = {
    "SmolLM2-135M": (
        sizes(576, 1536, 30, 9, 3, 49152) | SILU | {"model_type": "llama", "tie_word_embeddings": True},
        134_515_008,
    ),
    "Llama-3.2-1B": (
        sizes(2048, 8192, 16, 32, 8, 128256)
        | SILU
        | {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 64},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        sizes(4096, 14336, 32, 32, 8, 32000) | SILU | {"model_type": "mistral", "sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        sizes(896, 4864, 24, 14, 2, 151936) | SILU | {"model_type": "qwen2", "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        sizes(1024, 3072, 28, 16, 8, 151936)
        | SILU
        | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 128},
        596_049_920,
    ),
    "gemma-2-2b": (sizes(2304, 9216, 26, 8, 4, 256000) | GELU | {"model_type": "gemma2"}, 2_614_341_888),
    "gemma-3-1b": (
        sizes(1152, 6912, 26, 4, 1, 262144) | GELU | {"model_type": "gemma3_text", "head_dim": 256},
        999_885_952,
    ),
    # Published without heads, vocabulary and activation: they are transformers' defaults.
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        },
        3_880_263_168,
    ),
    "Phi-3-mini-4k": (
        sizes(3072, 8192, 32, 32, 32, 32064) | SILU | {"model_type": "phi3", "sliding_window": 2047},
        3_821_079_552,
    ),
    "phi-4": (
        sizes(5120, 17920, 40, 40, 10, 100352) | SILU | {"model_type": "phi3", "rope_theta": 250000},
        14_659_507_200,
    ),
}


def read(config: Config) -> Architecture:
    return read_architecture(Settings(CONFIG, config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_means_the_published_number_of_weights(name: str) -> None:
    config, weights = PUBLISHED[name]
    assert sum(prod(shape) for shape in tensor_shapes(read(config)).values()) == weights


def windows(config: Config) -> list[int | None]:
    return [kind.sliding_window for kind in read(config).attention]


def test_gemma_3_slides_five_layers_and_shows_the_sixth_everything() -> None:
    config = PUBLISHED["gemma-3-1b"][0] | {"num_hidden_layers": 13, "sliding_window": 512}
    assert windows(config) == [*[512] * 5, None] * 2 + [512]


def test_gemma_2_slides_every_other_layer() -> None:
    assert windows(PUBLISHED["gemma-2-2b"][0] | {"num_hidden_layers": 4}) == [4096, None] * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [None] * 3),
        ({"use_sliding_window": True, "max_window_layers": 3}, [None] * 3),
        ({"use_sliding_window": True, "max_window_layers": 0}, [4096] * 3),
        ({"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 7}, [None, None, 7]),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 3),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            [4096, None, None],
        ),
    ],
)
def test_qwen_slides_from_a_layer_on_if_it_slides_at_all(fields: Config, expected: list[int | None]) -> None:
    assert windows(PUBLISHED["Qwen2.5-0.5B"][0] | {"num_hidden_layers": 3} | fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 4096),
        ({"sliding_window": None}, None),
        ({"sliding_window": 100, "max_position_embeddings": 100}, None),
        ({"sliding_window": 99, "max_position_embeddings": 100}, 99),
    ],
)
def test_a_window_as_long_as_the_context_is_none(fields: Config, expected: int | None) -> None:
    config = sizes(64, 128, 1, 4, 2, 288) | SILU | {"model_type": "mistral"}
    assert windows(config | fields) == [expected]


def test_biases_are_those_that_the_settings_name() -> None:
    llama = sizes(64, 128, 1, 4, 2, 288) | SILU | {"model_type": "llama"}
    assert read(llama).biases == set()
    assert OUTPUT in read(llama | {"attention_bias": True}).biases
    assert read(llama | {"mlp_bias": True}).biases == {GATE, UP, DOWN}
    assert OUTPUT not in read(llama | {"model_type": "qwen2"}).biases
    assert QUERY in read(llama | {"model_type": "qwen2"}).biases


def test_old_and_new_forms_of_rotary_settings_mean_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = sizes(64, 128, 1, 4, 2, 288) | SILU | {"model_type": "llama"}
    old = read(plain | {"rope_theta": 500000.0, "rope_scaling": scaling})
    assert read(plain | {"rope_parameters": scaling | {"rope_theta": 500000.0}}) == old
    assert read(plain) != old


def test_old_and_new_forms_of_two_rotations_mean_the_same() -> None:
    plain = PUBLISHED["gemma-3-1b"][0]
    linear = {"rope_type": "linear", "factor": 8.0}
    old = read(plain | {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": linear})
    both = {"sliding_attention": {"rope_theta": 3e4}, "full_attention": linear | {"rope_theta": 2e6}}
    assert read(plain | {"rope_parameters": both}) == old
    local, far = old.attention[0].inverse_frequencies, old.attention[5].inverse_frequencies
    assert (local[0], far[0]) == (1.0, 1 / 8)
    np.testing.assert_allclose([local[1], far[1]], [3e4 ** (-2 / 256), 2e6 ** (-2 / 256) / 8])


def test_a_part_of_a_head_turns_in_phi_alone() -> None:
    phi = PUBLISHED["phi-4"][0] | {"partial_rotary_factor": 0.75}
    assert len(read(phi).attention[0].inverse_frequencies) == 48
    with pytest.raises(BuildError, match=r"partial_rotary_factor 0\.75 is not supported"):
        read(PUBLISHED["SmolLM2-135M"][0] | {"partial_rotary_factor": 0.75})


def test_a_language_model_takes_the_tied_head_of_the_whole() -> None:
    config = PUBLISHED["gemma-3-4b"][0]
    assert read(config).tied_embedding
    assert not read(config | {"tie_word_embeddings": False}).tied_embedding


REFUSED = [
    ("llama2", {"model_type": "mamba"}, r"model_type 'mamba' is not supported"),
    ("llama2", {"model_type": None}, r"model_type None"),
    ("llama2", {"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ("llama2", {"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
    ("llama2", {"hidden_size": None}, r"hidden_size should be a positive integer, found None"),
    ("llama2", {"hidden_size": 66}, r"num_attention_heads 4 does not divide hidden_size 66"),
    ("llama2", {"num_hidden_layers": 0}, r"num_hidden_layers"),
    ("llama2", {"num_hidden_layers": True}, r"num_hidden_layers"),
    ("llama2", {"num_key_value_heads": 3}, r"num_key_value_heads 3 does not divide"),
    ("llama2", {"head_dim": 15}, r"head_dim 15 should be even"),
    ("llama2", {"attention_bias": "yes"}, r"attention_bias should be true or false"),
    ("llama2", {"max_position_embeddings": 1 << 40}, r"max_position_embeddings should be at most"),
    ("llama2", {"num_hidden_layers": 100_000}, r"num_hidden_layers should be at most 1024"),
    ("llama2", {"hidden_size": 1 << 20}, r"head_dim 262144 should be even"),
    ("llama2", {"rms_norm_eps": float("nan")}, r"rms_norm_eps should be a positive number"),
    ("llama2", {"rms_norm_eps": float("inf")}, r"rms_norm_eps should be a positive number"),
    ("llama2", {"rope_scaling": [8.0]}, r"rope_scaling should be an object"),
    ("llama2", {"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling\.rope_type 'yarn' is not supported"),
    ("llama2", {"rope_scaling": {"type": "dynamic"}}, r"rope_scaling\.rope_type 'dynamic'"),
    ("llama2", {"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor should be"),
    ("llama2", {"rope_parameters": {"rope_type": 3}}, r"rope_parameters\.rope_type should be a text"),
    (
        "llama2",
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        r"rope_parameters\.full_attention",
    ),
    ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, r"rope_scaling\.low_freq_factor"),
    ("mistral", {"sliding_window": -1}, r"sliding_window"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, r"layer_types names layers without a window"),
    ("ministral", {"layer_types": ["full_attention"]}, r"layer_types has 1 entries for 2 layers"),
    ("ministral", {"layer_types": ["chunked_attention"] * 2}, r"layer_types 'chunked_attention'"),
    ("qwen2-window", {"max_window_layers": "all"}, r"max_window_layers"),
    ("gemma2", {"hidden_activation": "gelu"}, r"hidden_activation 'gelu'"),
    ("gemma2", {"attn_logit_softcapping": 0}, r"attn_logit_softcapping should be a positive number"),
    ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention True"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50.0"),
    ("gemma3-multimodal", {"text_config": None}, r"text_config should be"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, r"rope_scaling\.rope_type 'longrope' is not supported"),
    ("phi3", {"rope_scaling": {"type": "su"}}, r"rope_scaling\.rope_type 'longrope' is not supported"),
    ("phi3-partial", {"partial_rotary_factor": 1.5}, r"partial_rotary_factor 1.5"),
]


@pytest.mark.parametrize(("name", "fields", "named"), REFUSED)
def test_what_cannot_be_built_is_refused_by_file_and_field(name: str, fields: Config, named: str) -> None:
    with pytest.raises(BuildError, match=rf"^model/config\.json: {named}") as caught:
        read(CONFIGS[name] | fields)
    assert caught.value.hint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data(), name=st.sampled_from(sorted(CONFIGS)), value=json_values)
def test_whatever_a_field_holds_it_is_understood_or_refused(
    data: st.DataObject, name: str, value: Any
) -> None:
    config = CONFIGS[name]
    field = data.draw(st.sampled_from(sorted({*config, "rope_scaling", "rope_parameters", "layer_types"})))
    try:
        shape = read(config | {field: value})
    except BuildError as error:
        refusal: str | None = error.message
    else:
        refusal = None
        assert len(shape.attention) == shape.layers
        assert all(0 < 2 * len(kind.inverse_frequencies) <= shape.head_dim for kind in shape.attention)
        assert all(np.isfinite(kind.inverse_frequencies).all() for kind in shape.attention)
    assert refusal is None or refusal.startswith(str(CONFIG))


def test_a_field_inside_the_language_model_is_named_with_its_place() -> None:
    config = CONFIGS["gemma3-multimodal"]
    broken = config | {"text_config": config["text_config"] | {"num_hidden_layers": "many"}}
    with pytest.raises(BuildError, match=r"config\.json: text_config\.num_hidden_layers should be"):
        read(broken)


def test_an_unknown_type_is_told_which_are_known() -> None:
    with pytest.raises(BuildError) as caught:
        read({"model_type": "mamba"})
    assert all(name in caught.value.hint for name in MODEL_TYPES)


def test_every_type_has_been_compared_with_transformers() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(MODEL_TYPES)
