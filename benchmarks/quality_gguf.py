"""GGUF files of float weights, for peers that read nothing else, and what of such a file is weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    KEY,
    OUTPUT,
    QUERY,
    UP,
    VALUE,
    Architecture,
    layer_tensor,
    tensor_shapes,
)
from edgellm_buildhost.checkpoint.open import open_checkpoint

_PARTS = {
    "input_layernorm": "attn_norm",
    QUERY: "attn_q",
    KEY: "attn_k",
    VALUE: "attn_v",
    OUTPUT: "attn_output",
    "post_attention_layernorm": "ffn_norm",
    GATE: "ffn_gate",
    UP: "ffn_up",
    DOWN: "ffn_down",
}
_OUTSIDE = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
# What follows from the tensors that are written.
_DROPPED = {"general.architecture", "general.file_type", "general.quantization_version"}

Tensors = Callable[[str], NDArray[np.float32]]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a file, and of the matrices of its layers alone."""

    file_bytes: int
    linear_bytes: int


def write_float_gguf(original: Path, shape: Architecture, tensor: Tensors, target: Path) -> None:
    """An F32 file of the tensors by our names, with tokenizer and settings of the `original` GGUF file."""
    reader = gguf.GGUFReader(original)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in _DROPPED:
            kind = field.types[0]
            item_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, item_kind)
    names = _stored_names(shape)
    for name, tensor_shape in tensor_shapes(shape).items():
        writer.add_tensor_info(
            names[name], tensor_shape, np.dtype(np.float32), 4 * int(np.prod(tensor_shape))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in names:
        writer.write_tensor_data(_stored(shape, name, tensor(name)))
    writer.close()


def float_gguf_of(directory: Path, original: Path, target: Path) -> None:
    """An F32 file of a Hugging Face directory."""
    checkpoint = open_checkpoint(directory)
    write_float_gguf(original, checkpoint.architecture, checkpoint.tensor, target)


def sizes(path: Path) -> Sizes:
    """Of a GGUF file."""
    tensors = gguf.GGUFReader(path).tensors
    linears = (t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    return Sizes(path.stat().st_size, sum(int(t.n_bytes) for t in linears))


def _stored_names(shape: Architecture) -> dict[str, str]:
    found = dict(_OUTSIDE)
    for layer in range(shape.layers):
        found |= {
            layer_tensor(layer, part): f"blk.{layer}.{stored}.weight" for part, stored in _PARTS.items()
        }
    return {name: found[name] for name in tensor_shapes(shape)}


def _stored(shape: Architecture, name: str, tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """llama.cpp turns neighbours (2i, 2i+1) of a head where Hugging Face turns (i, i + head_dim/2)."""
    heads = {QUERY: shape.heads, KEY: shape.kv_heads}
    for part, count in heads.items():
        if name.endswith(f"{part}.weight"):
            halves = tensor.reshape(count, 2, shape.head_dim // 2, tensor.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor
