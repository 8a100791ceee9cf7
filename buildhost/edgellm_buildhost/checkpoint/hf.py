"""Reads a Hugging Face directory: config.json, safetensors (sharded or not) and the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgellm_buildhost.checkpoint.base import EMBEDDING, HEAD, Architecture, Checkpoint, TokenizerFiles
from edgellm_buildhost.checkpoint.rope import scaled_frequencies
from edgellm_buildhost.errors import BuildError

_FAMILIES = ("llama", "mistral")
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FETCH_AGAIN = "fetch the directory again from where the model was published"


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as `huggingface-cli download` leaves it."""

    def __init__(self, directory: Path) -> None:
        """Read and check the metadata; raises BuildError naming the file and field."""
        self._directory = directory
        self.name = directory.resolve().name
        self._config = _Settings(directory / "config.json")
        self.architecture = _architecture(self._config)
        self._shard_of = _tensor_index(directory)
        if (
            EMBEDDING in self._shard_of
            and HEAD not in self._shard_of
            and not self.architecture.tied_embedding
        ):
            raise BuildError(
                f"{directory / 'config.json'}: tie_word_embeddings is false, but there is no tensor {HEAD}",
                _FETCH_AGAIN,
            )
        self.tokenizer = _tokenizer(directory, self._config)

    def _read(self, name: str) -> NDArray[np.float32]:
        file_name = self._shard_of.get(name)
        if file_name is None:
            raise BuildError(f"{self._directory}: no tensor {name} in the safetensors files", _FETCH_AGAIN)
        path = self._directory / file_name
        try:
            return _read_float32(path, name)
        except FileNotFoundError:
            raise BuildError(f"{path}: missing, and tensor {name} should be in it", _FETCH_AGAIN) from None
        except (SafetensorError, OSError) as error:
            raise BuildError(f"{path}: cannot read tensor {name}: {error}", _FETCH_AGAIN) from error


class _Settings:
    """A JSON object whose fields are checked as they are taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BuildError(f"{path}: missing", "give a directory that holds a whole model") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BuildError(f"{path}: not JSON: {error}", _FETCH_AGAIN) from error
        if not isinstance(value, dict):
            raise BuildError(f"{path}: should hold a JSON object", _FETCH_AGAIN)
        self._fields: dict[str, Any] = value

    def get(self, field: str) -> Any:
        return self._fields.get(field)

    def positive(self, field: str, default: int | None = None) -> int:
        value = self._fields.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise BuildError(
                f"{self.path}: {field} should be a positive integer, found {value!r}", _FETCH_AGAIN
            )
        return value

    def number(self, field: str, default: float) -> float:
        value = self._fields.get(field, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise BuildError(
                f"{self.path}: {field} should be a positive number, found {value!r}", _FETCH_AGAIN
            )
        return float(value)

    def must_be(self, field: str, allowed: tuple[object, ...]) -> None:
        value = self._fields.get(field, allowed[0])
        if value not in allowed:
            raise BuildError(
                f"{self.path}: {field} {value!r} is not supported",
                f"supported: {', '.join(str(item) for item in allowed if item is not None)}; choose "
                f"another model",
            )


def _architecture(config: _Settings) -> Architecture:
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise BuildError(
            f"{config.path}: model_type {family!r} is not supported",
            f"choose a model of the families {', '.join(_FAMILIES)} (SmolLM2 is of the first)",
        )
    config.must_be("hidden_act", ("silu",))
    config.must_be("attention_bias", (False, None))
    config.must_be("mlp_bias", (False, None))
    if config.get("quantization_config") is not None:
        raise BuildError(
            f"{config.path}: the checkpoint is quantized already (quantization_config)",
            "give the unquantized checkpoint that it was made from",
        )
    hidden, heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    head_dim = config.positive("head_dim", hidden // heads)
    kv_heads = config.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise BuildError(
            f"{config.path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}",
            _FETCH_AGAIN,
        )
    context = config.positive("max_position_embeddings", 2048)
    window = config.get("sliding_window")
    parameters = config.get("rope_parameters")  # transformers 5 keeps theta and scaling in one object
    scaling = parameters if parameters is not None else config.get("rope_scaling")
    theta = float((parameters or {}).get("rope_theta") or config.number("rope_theta", 10000.0))
    return Architecture(
        family=str(family),
        layers=config.positive("num_hidden_layers"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=config.positive("intermediate_size"),
        vocab_size=config.positive("vocab_size"),
        context_length=context,
        rms_epsilon=config.number("rms_norm_eps", 1e-6),
        tied_embedding=bool(config.get("tie_word_embeddings") or False),
        inverse_frequencies=scaled_frequencies(theta, head_dim, scaling),
        sliding_window=int(window) if window and int(window) < context else None,
    )


def _tensor_index(directory: Path) -> dict[str, str]:
    """The file that holds each tensor; every named shard must be there."""
    index_path = directory / _INDEX_FILE
    if index_path.exists():
        weight_map = _Settings(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BuildError(f"{index_path}: weight_map is missing", _FETCH_AGAIN)
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name:
                raise BuildError(
                    f"{index_path}: shard {file_name!r} lies outside the directory", _FETCH_AGAIN
                )
            if not (directory / file_name).is_file():
                raise BuildError(
                    f"{directory / file_name}: shard missing, {_INDEX_FILE} names it", _FETCH_AGAIN
                )
        return dict(weight_map)
    path = directory / _SINGLE_FILE
    if not path.is_file():
        raise BuildError(
            f"{directory}: no {_SINGLE_FILE} and no {_INDEX_FILE}",
            "give a directory with safetensors weights (pickled .bin files are not read)",
        )
    try:
        with safe_open(path, "np") as file:
            return dict.fromkeys(file.keys(), _SINGLE_FILE)
    except SafetensorError as error:
        raise BuildError(f"{path}: damaged or cut short: {error}", _FETCH_AGAIN) from error


def _read_float32(path: Path, name: str) -> NDArray[np.float32]:
    with safe_open(path, "np") as file:
        view = file.get_slice(name)
        kind, shape = view.get_dtype(), tuple(view.get_shape())
        if kind == "BF16":
            # numpy knows no bfloat16, so safetensors cannot hand it out: map the bytes and read them with
            # ml_dtypes.
            return _mapped_bfloat16(path, name).reshape(shape).astype(np.float32)
        if kind not in {"F32", "F16", "F64"}:
            raise BuildError(
                f"{path}: tensor {name} has dtype {kind}, floating point is needed",
                "give the unquantized checkpoint that this one was made from",
            )
        return np.asarray(file.get_tensor(name), dtype=np.float32)


def _mapped_bfloat16(path: Path, name: str) -> NDArray[Any]:
    """The tensor's bytes by the safetensors layout: u64 length of the header, JSON header, data."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(header_bytes))[name]["data_offsets"]
    count = (end - begin) // 2
    return np.memmap(
        path, dtype=ml_dtypes.bfloat16, mode="r", offset=8 + header_bytes + begin, shape=(count,)
    )


def _tokenizer(directory: Path, config: _Settings) -> TokenizerFiles:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BuildError(
            f"{path}: missing",
            "save the tokenizer in its fast form first: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    settings_path = directory / "tokenizer_config.json"
    settings = _Settings(settings_path) if settings_path.exists() else None
    template_path = directory / "chat_template.jinja"
    template = template_path.read_text(encoding="utf-8") if template_path.exists() else None
    if template is None and settings is not None:
        template = _default_template(settings.get("chat_template"))
    generation_path = directory / "generation_config.json"
    generation = _Settings(generation_path) if generation_path.exists() else config
    eos = generation.get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    eos_ids = tuple(int(item) for item in (eos if isinstance(eos, list) else [eos]) if item is not None)
    if not eos_ids:
        raise BuildError(
            f"{config.path}: eos_token_id is missing, generation would never end",
            'add "eos_token_id" to generation_config.json',
        )
    bos = config.get("bos_token_id")
    add_bos = bool(settings.get("add_bos_token")) if settings is not None else False
    return TokenizerFiles(path.read_bytes(), template, None if bos is None else int(bos), eos_ids, add_bos)


def _default_template(template: Any) -> str | None:
    """One template, or the one called `default` where a model has several."""
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
