"""The peer's files: the model's own weights, dequantized to float32 and quantized again by llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import llama_cpp as api  # type: ignore[import-not-found, unused-ignore]

FILE_TYPES = {
    "Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": api.LLAMA_FTYPE_MOSTLY_Q4_1,
    "IQ4_NL": api.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "Q4_K_S": api.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q4_K_M": api.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def peer_weights(model: Path, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """A GGUF file for each type, made where it is missing; raises RuntimeError if llama.cpp refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.gguf" for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        plain = folder / "F32.gguf"
        try:
            _dequantize(model, plain)
            for name in missing:
                _quantize(plain, paths[name], FILE_TYPES[name])
        finally:
            plain.unlink(missing_ok=True)
    return paths


def _dequantize(source: Path, target: Path) -> None:
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in {"general.architecture", "general.file_type"}:
            kind = field.types[0]
            item_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, item_kind)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(source: Path, target: Path, file_type: int) -> None:
    params = api.llama_model_quantize_default_params()
    params.ftype = file_type
    partial = target.with_suffix(".partial")
    status = api.llama_model_quantize(str(source).encode(), str(partial).encode(), params)
    if status != 0:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"llama.cpp does not quantize to {target.stem}: {status}")
    partial.rename(target)
