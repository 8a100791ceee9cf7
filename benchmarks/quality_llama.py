"""llama.cpp's quantizer, from an F32 file to any of its types, in a process of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_cpp import llama_cpp as api  # type: ignore[import-not-found, unused-ignore]

from benchmarks.llama_graph import start_backend
from benchmarks.machine import usable_cores

TYPES = ("Q4_0", "IQ4_NL", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0")


def quantize(source: Path, target: Path, name: str, *, tables: str | None) -> None:
    """Have llama.cpp quantize an F32 file; `tables` is the type of embedding and head, if not its choice.

    Raises RuntimeError if it refuses.
    """
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread = usable_cores()
    if tables is not None:
        params.output_tensor_type = params.token_embedding_type = getattr(api, f"GGML_TYPE_{tables}")
    if status := api.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp does not quantize to {name}: {status}")


def main() -> int:
    """Quantizes in a process of its own, so that its memory can be told apart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_llama", description=__doc__)
    parser.add_argument("source", type=Path, metavar="F32.gguf")
    parser.add_argument("target", type=Path)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("--tables", help="type of embedding and head, as Q8_0")
    options = parser.parse_args()
    start_backend()
    quantize(options.source, options.target, options.type, tables=options.tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
