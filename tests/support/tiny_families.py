"""Makes a tiny checkpoint of every family that can be built, in the form in which the family is published.

The configurations and names of tensors are written out here, and not taken from the code that they test.
Weights follow from a seed by numpy, so that they can be made again where there is no torch. Windows are
shorter than `TOKENS`, soft caps lie where they bite and epsilons are large, so that each feature moves the
logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.support.tiny_models import BOS_ID, EOS_ID, tiny_tokenizer_json

VOCAB = 288
TOKENS: NDArray[np.int64] = np.random.default_rng(7).integers(3, VOCAB, 24)
POSITIONS = (0, 1, *range(10, 24))
"""The positions of `TOKENS` whose logits are recorded."""

Config = dict[str, Any]
Tensors = dict[str, NDArray[np.float32]]

_SIZES: Config = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}
_WINDOW = 6


def _config(model_type: str, **fields: Any) -> Config:
    activation = {"hidden_act": "silu"}
    if model_type.startswith("gemma"):
        activation = {"hidden_activation": "gelu_pytorch_tanh"}
    return _SIZES | activation | {"model_type": model_type} | fields


_GEMMA2 = _config(
    "gemma2",
    num_hidden_layers=3,
    head_dim=32,
    query_pre_attn_scalar=24,
    sliding_window=_WINDOW,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.0,
    tie_word_embeddings=True,
)
_GEMMA3 = _config(
    "gemma3_text",
    num_hidden_layers=4,
    head_dim=32,
    query_pre_attn_scalar=24,
    sliding_window=_WINDOW,
    tie_word_embeddings=True,
)
_GEMMA3_OLD = _GEMMA3 | {
    "sliding_window_pattern": 3,
    "rope_theta": 1000.0,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 8,
}

CONFIGS: dict[str, Config] = {
    "llama2": _config("llama", num_key_value_heads=4),
    "llama3": _config(
        "llama",
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "smollm2": _config("llama", hidden_size=96, num_attention_heads=6, tie_word_embeddings=True),
    "llama-biases": _config("llama", attention_bias=True, mlp_bias=True),
    "llama-linear": _config("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "mistral": _config("mistral", head_dim=32, sliding_window=_WINDOW),
    "ministral": _config(
        "ministral",
        head_dim=16,
        sliding_window=_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen2": _config("qwen2", tie_word_embeddings=True, rope_theta=1000000.0, use_sliding_window=False),
    "qwen2-window": _config(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=_WINDOW, max_window_layers=1
    ),
    "qwen3": _config(
        "qwen3",
        head_dim=32,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3
    | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        },
    },
    "gemma3-multimodal": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": _GEMMA3_OLD,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "eos_token_id": [EOS_ID, 1],
        "image_token_index": 287,
    },
    "phi3": _config("phi3", sliding_window=_WINDOW, original_max_position_embeddings=64),
    "phi3-partial": _config("phi3", hidden_size=128, partial_rotary_factor=0.75, tie_word_embeddings=True),
}


def write_family(directory: Path, name: str) -> Path:
    """Write the checkpoint `name` of `CONFIGS` as a Hugging Face directory, float32, and return it."""
    directory.mkdir(parents=True)
    config = CONFIGS[name]
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json(VOCAB), encoding="utf-8")
    save_file(family_tensors(config), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def family_tensors(config: Config) -> Tensors:
    """All weights of the language model by their published names, linear ones `[out, in]`."""
    if config["model_type"] == "gemma3":
        return {
            f"language_model.{name}": tensor for name, tensor in family_tensors(config["text_config"]).items()
        }
    draw = _Draw(config)
    hidden = int(config["hidden_size"])
    tensors = {"model.embed_tokens.weight": draw.matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in _layer(config, draw).items()}
    tensors["model.norm.weight"] = draw.gain(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], hidden)
    return tensors


class _Draw:
    """Random weights, one after the other."""

    def __init__(self, config: Config) -> None:
        self._rng = np.random.default_rng(11)
        # Gemma stores how far a gain is from 1.
        self._centre = 0.0 if config["model_type"].startswith("gemma") else 1.0

    def matrix(self, rows: int, columns: int) -> NDArray[np.float32]:
        return (self._rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def gain(self, length: int) -> NDArray[np.float32]:
        return (self._centre + 0.3 * self._rng.standard_normal(length)).astype(np.float32)

    def bias(self, length: int) -> NDArray[np.float32]:
        return (0.5 * self._rng.standard_normal(length)).astype(np.float32)


def _layer(config: Config, draw: _Draw) -> Tensors:
    kind, hidden = config["model_type"], int(config["hidden_size"])
    linears = _fused_linears(config) if kind == "phi3" else _linears(config)
    tensors = {f"{name}.weight": draw.matrix(rows, columns) for name, (rows, columns) in linears.items()}
    for name in _biased(config):
        tensors[f"{name}.bias"] = draw.bias(linears[name][0])
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind.startswith("gemma"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    tensors |= {f"{name}.weight": draw.gain(hidden) for name in norms}
    if kind in {"qwen3", "gemma3_text"}:
        head_dim = config["head_dim"]
        tensors |= {f"self_attn.{name}_norm.weight": draw.gain(head_dim) for name in ("q", "k")}
    return tensors


def _linears(config: Config) -> dict[str, tuple[int, int]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    query, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def _fused_linears(config: Config) -> dict[str, tuple[int, int]]:
    apart = _linears(config)
    qkv = sum(apart[f"self_attn.{part}_proj"][0] for part in "qkv")
    return {
        "self_attn.qkv_proj": (qkv, config["hidden_size"]),
        "self_attn.o_proj": apart["self_attn.o_proj"],
        "mlp.gate_up_proj": (2 * config["intermediate_size"], config["hidden_size"]),
        "mlp.down_proj": apart["mlp.down_proj"],
    }


def _biased(config: Config) -> list[str]:
    parts = []
    if config["model_type"] == "qwen2":
        parts = [f"self_attn.{part}_proj" for part in "qkv"]
    if config.get("attention_bias"):
        parts = [f"self_attn.{part}_proj" for part in "qkvo"]
    if config.get("mlp_bias"):
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return parts
