"""onnxruntime-genai's files: the model's own weights, dequantized to float32 and built by its own builder."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save_file

from edgellm_buildhost.architecture import Architecture, tensor_shapes
from edgellm_buildhost.checkpoint import Checkpoint, open_checkpoint

# The builder's options. Without any it rounds to nearest in groups of 32: its fastest 4-bit type.
RECIPES = {"int8": ("int8",), "int4": ("int4",), "int4 k-quant": ("int4", "algo_config=k_quant_last")}
_BUILD_S = 900


def genai_weights(model: Path, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """A model folder for each recipe, made where it is missing.

    Raises RuntimeError if the builder cannot run or fails.
    """
    paths = {name: folder / f"genai-{name.replace(' ', '-')}" for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if absent:
            raise RuntimeError(f"its model builder needs {' and '.join(absent)}, which are not installed")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = Path(scratch) / "float32"
            _write_hugging_face(open_checkpoint(model), source)
            for name in missing:
                _build(source, paths[name], RECIPES[name], Path(scratch))
    return paths


def _build(source: Path, target: Path, recipe: Sequence[str], scratch: Path) -> None:
    precision, *extra = recipe
    partial = scratch / target.name
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(partial), "-p", precision, "-e", "cpu", "-c", str(scratch)]
    command += ["--extra_options", *extra] if extra else []
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=_BUILD_S)
    if done.returncode != 0:
        raise RuntimeError(f"its model builder failed: {done.stderr[-500:]}")
    shutil.move(partial, target)


def _write_hugging_face(checkpoint: Checkpoint, folder: Path) -> None:
    """The layout that the builder reads: configuration, tokenizer, weights."""
    folder.mkdir()
    names = tensor_shapes(checkpoint.architecture)
    weights = {name: checkpoint.tensor(name) for name in names}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer = checkpoint.tokenizer
    (folder / "config.json").write_text(json.dumps(_config(checkpoint)), "utf-8")
    (folder / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    shape = checkpoint.architecture
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
        "rope_theta": _rope_theta(shape),
        "tie_word_embeddings": shape.tied_embedding,
        "torch_dtype": "float32",
        "bos_token_id": checkpoint.tokenizer.bos_id,
        "eos_token_id": list(checkpoint.tokenizer.eos_ids),
    }


def _rope_theta(shape: Architecture) -> float:
    """The base of plain rotary frequencies; raises RuntimeError where they are scaled."""
    frequencies, pairs = shape.attention[0].inverse_frequencies, shape.head_dim // 2
    theta = round(frequencies[1] ** -pairs, 3)
    if not math.isclose(frequencies[-1], theta ** (-(pairs - 1) / pairs), rel_tol=1e-6):
        raise RuntimeError("scaled rotary frequencies are not written for it")
    return theta
