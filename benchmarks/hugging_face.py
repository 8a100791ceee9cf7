"""Writes a Llama-shaped model as a Hugging Face directory, one shard at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgellm_buildhost.architecture import Architecture, tensor_shapes
from edgellm_buildhost.checkpoint.base import TokenizerFiles

_OUTSIDE = "outside"


def shards(shape: Architecture) -> list[list[str]]:
    """The names of all tensors, a list for each layer and one for what is outside of the layers."""
    parts: dict[str, list[str]] = {}
    for name in tensor_shapes(shape):
        layer = name.split(".")[2] if name.startswith("model.layers.") else _OUTSIDE
        parts.setdefault(layer, []).append(name)
    outside = parts.pop(_OUTSIDE)
    return [*parts.values(), outside]


def write_weights(directory: Path, parts: Iterable[Mapping[str, NDArray[np.generic]]], count: int) -> int:
    """Write `count` safetensors files and their index, and return the bytes of all tensors.

    The parts may be made as they are asked for: one at a time is held.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(dict(tensors), directory / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return total


def write_settings(directory: Path, shape: Architecture, tokenizer: TokenizerFiles, dtype: str) -> None:
    """Write config.json and the tokenizer; raises RuntimeError for rotary frequencies that are scaled."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.rms_epsilon,
        "rope_theta": rope_theta(shape),
        "tie_word_embeddings": shape.tied_embedding,
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
    }
    _write_json(directory / "config.json", config)
    (directory / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    _write_json(directory / "tokenizer_config.json", settings)


def rope_theta(shape: Architecture) -> float:
    """The base of plain rotary frequencies; raises RuntimeError where they are scaled."""
    frequencies, pairs = shape.attention[0].inverse_frequencies, shape.head_dim // 2
    theta = round(frequencies[1] ** -pairs, 3)
    if not math.isclose(frequencies[-1], theta ** (-(pairs - 1) / pairs), rel_tol=1e-6):
        raise RuntimeError("scaled rotary frequencies are not written")
    return theta


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
