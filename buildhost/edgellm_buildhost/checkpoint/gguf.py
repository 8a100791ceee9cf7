"""Reads a GGUF file of the Llama architecture, dequantizing one tensor at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import Architecture, AttentionKind
from edgellm_buildhost.checkpoint.base import Checkpoint, TokenizerFiles
from edgellm_buildhost.checkpoint.gguf_tokenizer import GgufVocabulary, tokenizer_json
from edgellm_buildhost.checkpoint.rope import plain_frequencies
from edgellm_buildhost.errors import BuildError

GGUF_MAGIC = b"GGUF"
_FETCH_AGAIN = "fetch the file again and compare its checksum with the published one"
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class GgufCheckpoint(Checkpoint):
    """A GGUF file, mapped; tensors of any type that the `gguf` package can dequantize."""

    def __init__(self, path: Path) -> None:
        """Read and check the metadata; raises BuildError naming the file and field."""
        self._path = path
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        fields = _Fields(path, self._reader)
        self.architecture = _architecture(fields, self._tensors)
        self.name = path.stem
        self.tokenizer = _tokenizer(fields)

    def _read(self, name: str) -> NDArray[np.float32]:
        values = self._stored_rows(name, slice(None))
        if name.endswith("q_proj.weight"):
            return _halves_from_pairs(values, self.architecture.heads)
        if name.endswith("k_proj.weight"):
            return _halves_from_pairs(values, self.architecture.kv_heads)
        return values

    def _read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        if name not in _WHOLE:  # rows of query and key have another order here
            return super()._read_rows(name, start, stop)
        return self._stored_rows(name, slice(start, stop))

    def _stored_rows(self, name: str, rows: slice) -> NDArray[np.float32]:
        stored = _stored_name(name)
        tensor = self._tensors.get(stored)
        if tensor is None:
            raise BuildError(f"{self._path}: no tensor {stored}", _FETCH_AGAIN)
        try:
            # Blocks lie inside a row, so rows can be dequantized by themselves.
            values = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise BuildError(
                f"{self._path}: tensor {stored} has type {tensor.tensor_type.name}, which cannot be "
                f"read: {error}",
                "choose a file with F16, BF16, Q8_0, Q4 or K-quant weights",
            ) from error
        columns = tuple(int(n) for n in reversed(tensor.shape))[1:]
        return np.asarray(values, dtype=np.float32).reshape(-1, *columns)


def _open(path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader meets damage anywhere, with whatever numpy raises there
        raise BuildError(f"{path}: damaged or cut short: {error}", _FETCH_AGAIN) from error


class _Fields:
    """The key-value part of the file, each value checked as it is taken."""

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self._fields = reader.fields

    def value(self, key: str) -> Any:
        """The value, or None where the key is absent."""
        field = self._fields.get(key)
        return None if field is None else field.contents()

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or value <= 0:
            raise BuildError(
                f"{self.path}: {key} should be a positive integer, found {value!r}", _FETCH_AGAIN
            )
        return value

    def number(self, key: str, default: float) -> float:
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or value <= 0:
            raise BuildError(f"{self.path}: {key} should be a positive number, found {value!r}", _FETCH_AGAIN)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise BuildError(f"{self.path}: {key} should be a text, found {value!r}", _FETCH_AGAIN)
        return value


def _architecture(fields: _Fields, tensors: dict[str, Any]) -> Architecture:
    family = fields.text("general.architecture")
    if family != "llama":
        raise BuildError(
            f"{fields.path}: general.architecture {family!r} is not supported",
            "only llama is, of GGUF (Llama, SmolLM2, Mistral): give the Hugging Face directory of this model",
        )
    if fields.value("llama.expert_count"):
        raise BuildError(f"{fields.path}: mixtures of experts are not supported", "choose a dense model")
    if any(name.endswith("attn_q.bias") for name in tensors):
        raise BuildError(
            f"{fields.path}: attention with a bias is not supported", "choose a model without one"
        )
    hidden, heads = fields.positive("llama.embedding_length"), fields.positive("llama.attention.head_count")
    head_dim = fields.positive("llama.attention.key_length", hidden // heads)
    if fields.positive("llama.rope.dimension_count", head_dim) != head_dim:
        raise BuildError(
            f"{fields.path}: llama.rope.dimension_count differs from the head size {head_dim}",
            "partial rotary positions are not supported: choose another model",
        )
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise BuildError(f"{fields.path}: no tensor token_embd.weight", _FETCH_AGAIN)
    layers = fields.positive("llama.block_count")
    return Architecture(
        family=family,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=fields.positive("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_size=fields.positive("llama.feed_forward_length"),
        vocab_size=int(embedding.shape[1]),
        context_length=fields.positive("llama.context_length"),
        rms_epsilon=round(fields.number("llama.attention.layer_norm_rms_epsilon", 1e-5), 12),
        tied_embedding="output.weight" not in tensors,
        attention=(AttentionKind(_frequencies(fields, head_dim, tensors)),) * layers,
        attention_scale=head_dim**-0.5,
    )


def _frequencies(fields: _Fields, head_dim: int, tensors: dict[str, Any]) -> tuple[float, ...]:
    plain = plain_frequencies(fields.number("llama.rope.freq_base", 10000.0), head_dim)
    kind = fields.text("llama.rope.scaling.type", default="none")
    if kind not in {"none", "linear"}:
        raise BuildError(
            f"{fields.path}: llama.rope.scaling.type {kind!r} is not supported (none and linear are)",
            "choose a checkpoint without this scaling",
        )
    if kind == "linear":
        plain = plain / fields.number("llama.rope.scaling.factor", 1.0)
    # Llama 3.1's scaling is stored as one divisor per frequency.
    divisors = tensors.get("rope_freqs.weight")
    if divisors is not None:
        plain = plain / np.asarray(divisors.data, dtype=np.float64).reshape(-1)
    return tuple(plain.tolist())


def _tokenizer(fields: _Fields) -> TokenizerFiles:
    tokens = fields.value("tokenizer.ggml.tokens")
    if not tokens:
        raise BuildError(
            f"{fields.path}: no tokenizer (tokenizer.ggml.tokens)", "choose a file with its vocabulary inside"
        )
    vocabulary = GgufVocabulary(
        model=fields.text("tokenizer.ggml.model"),
        pre_tokenizer=fields.text("tokenizer.ggml.pre", default="default"),
        tokens=tuple(tokens),
        token_types=tuple(fields.value("tokenizer.ggml.token_type") or ()),
        merges=tuple(fields.value("tokenizer.ggml.merges") or ()),
    )
    ends = (fields.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    eos_ids = tuple(dict.fromkeys(int(item) for item in ends if item is not None))
    if not eos_ids:
        raise BuildError(
            f"{fields.path}: tokenizer.ggml.eos_token_id is missing", "choose another conversion of the model"
        )
    bos = fields.value("tokenizer.ggml.bos_token_id")
    template = fields.value("tokenizer.chat_template")
    return TokenizerFiles(
        tokenizer_json=tokenizer_json(vocabulary, fields.path),
        chat_template=template if isinstance(template, str) else None,
        bos_id=None if bos is None else int(bos),
        eos_ids=eos_ids,
        add_bos=bool(fields.value("tokenizer.ggml.add_bos_token") or False),
    )


def _stored_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if match is None:
        raise KeyError(name)
    return f"blk.{match[1]}.{_PARTS[match[2]]}.weight"


def _halves_from_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """From llama.cpp's rows (the two halves of a rotary head interleaved) to those of Hugging Face.

    llama.cpp rotates neighbours (2i, 2i+1), Hugging Face rotates (i, i + head_dim/2).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))
