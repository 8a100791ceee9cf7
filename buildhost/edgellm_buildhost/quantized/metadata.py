"""The files beside the weights: config.json, generation_config.json and the tokenizer's.

Of a Hugging Face source they are its own; of a GGUF file they are made from what it says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.base import Checkpoint, TokenizerFiles
from edgellm_buildhost.checkpoint.hf import CONFIG_FILE, QUANTIZATION
from edgellm_buildhost.checkpoint.rope import Llama3Scaling, llama3_frequencies, plain_frequencies
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.errors import BuildError

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
_TEXT_MODELS = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM")}
_SAME = 1e-6  # relative; a GGUF file has its figures as float32
_MOST_PLAIN_THETA = 1e9
# What Meta published; a GGUF file has only the factors that come of them.
_LLAMA3_SCALINGS = (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192))


def model_config(source: Checkpoint, table_type: str) -> dict[str, Any]:
    """The config.json of a float checkpoint in `table_type`; raises BuildError where none can be made.

    Of a multimodal model it is that of its language model, whose weights alone are written.
    """
    if source.directory is None:
        return made_config(source.name, source.architecture, source.tokenizer) | {"torch_dtype": table_type}
    config: dict[str, Any] = json.loads((source.directory / CONFIG_FILE).read_text(encoding="utf-8"))
    config.pop(QUANTIZATION, None)
    config.pop("dtype", None)
    text = config.get("text_config")
    if isinstance(text, dict):
        model_type, model_class = _TEXT_MODELS.get(
            str(config.get("model_type")), (text.get("model_type"), None)
        )
        kept = {
            key: config[key]
            for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings")
            if key in config
        }
        text = {key: value for key, value in text.items() if key != "dtype"}
        config = (
            kept | text | {"model_type": model_type, "architectures": [model_class] if model_class else None}
        )
    return config | {"torch_dtype": table_type}


def write_metadata(directory: Path, source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Write all files but the weights and their index."""
    write_json(directory / CONFIG_FILE, config)
    if source.directory is not None:
        for name in (GENERATION_FILE, *TOKENIZER_FILES):
            if (source.directory / name).is_file():
                shutil.copyfile(source.directory / name, directory / name)
        return
    write_tokenizer(directory, source.tokenizer)


def write_tokenizer(directory: Path, tokens: TokenizerFiles) -> None:
    """Write the files that say how text becomes tokens, and where an answer ends."""
    generation = {"bos_token_id": tokens.bos_id, "eos_token_id": list(tokens.eos_ids)}
    write_json(
        directory / GENERATION_FILE, {key: value for key, value in generation.items() if value is not None}
    )
    (directory / "tokenizer.json").write_bytes(tokens.tokenizer_json)
    write_json(directory / "tokenizer_config.json", _tokenizer_config(tokens))
    if tokens.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokens.chat_template, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As people read it; equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def made_config(name: str, shape: Architecture, tokens: TokenizerFiles) -> dict[str, Any]:
    """The config.json of a model that has none; raises BuildError for what is not of the Llama family."""
    if shape.family != "llama":
        raise BuildError(
            f"{name}: a config.json cannot be made from a GGUF file of the family {shape.family}",
            "give the Hugging Face directory of the model",
        )
    return {
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
        **_rotation(name, shape),
        "attention_bias": bool(shape.biases),
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied_embedding,
        "bos_token_id": tokens.bos_id,
        "eos_token_id": list(tokens.eos_ids),
    }


def _rotation(name: str, shape: Architecture) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of these angular steps: the last pair of a head turns slowest."""
    steps, dim = np.array(shape.attention[0].inverse_frequencies), shape.head_dim
    for factor, scaling in [(1.0, None), *((item.factor, item) for item in _LLAMA3_SCALINGS)]:
        theta = _rounded(float((steps[-1] * factor) ** (-dim / (dim - 2))) if dim > 2 else 10000.0)
        expected = plain_frequencies(theta, dim)
        expected = expected if scaling is None else llama3_frequencies(expected, scaling)
        if len(steps) == len(expected) and np.allclose(steps, expected, rtol=_SAME, atol=0):
            return {
                "rope_theta": theta,
                "rope_scaling": None if scaling is None else _scaling_fields(scaling),
            }
    raise BuildError(
        f"{name}: the rotary positions of this GGUF file are scaled as no config.json can say",
        "give the Hugging Face directory of the model",
    )


def _rounded(theta: float) -> float:
    """The whole number that float32 figures came from."""
    whole = float(round(theta)) if theta < _MOST_PLAIN_THETA else theta
    return whole if abs(whole - theta) <= 1e-4 * theta else theta


def _scaling_fields(scaling: Llama3Scaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _tokenizer_config(tokens: TokenizerFiles) -> dict[str, Any]:
    tokenizer = Tokenizer.from_str(tokens.tokenizer_json.decode())
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokens.add_bos}
    if tokens.bos_id is not None:
        found["bos_token"] = tokenizer.id_to_token(tokens.bos_id)
    return found | {"eos_token": tokenizer.id_to_token(tokens.eos_ids[0])}


def published_type(source: Checkpoint) -> str | None:
    """The type that a config.json gives its weights, as `bfloat16`; None where it says nothing."""
    if source.directory is None:
        return None
    config = Settings.read(source.directory / CONFIG_FILE)
    for settings in (config, config.section("text_config")):
        for field in ("dtype", "torch_dtype"):
            value = None if settings is None else settings.get(field)
            if isinstance(value, str):
                return value
    return None
