"""Our side of the quality table: engines as `edgellm build` makes them, and what of one is weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.our_graph import OurGraph
from benchmarks.quality_gguf import Sizes, write_float_gguf
from edgellm.bundle import EngineConfig
from edgellm_buildhost.architecture import EMBEDDING, HEAD, tensor_shapes
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.calibration.text import calibration_text
from edgellm_buildhost.checkpoint.open import open_checkpoint
from edgellm_buildhost.quantized.base import QuantizedCheckpoint
from edgellm_buildhost.quantized.open import open_quantized
from edgellm_buildhost.recipe import GridName, QuantName, Request

NAMES = (
    "int4",
    "int4 symmetric/64",
    "int4-awq",
    "int4-gptq",
    "int4-gptq zero-point/32",
    "int4-gptq minimum/32",
    "auto 132500000",
    "auto 150000000",
    "int8",
    "int8-smoothquant",
)
"""Methods, as for `--quant`; behind them grid and group size, or the bytes of `auto`."""
WEIGHTS_ONLY = ("int4 symmetric/64", "int4-awq", "int4-gptq")
"""Methods that are looked at without 8-bit activations and tables too, as the peers that are no engines."""
_CONFIG_FILE, _ENGINE, _WORK = "config.json", "engine", "work"
# What a layer holds besides its matrices.
_NO_MATRIX = {"GroupQueryAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}


def request(name: str) -> Request:
    """What to ask the build host for: one of `NAMES`."""
    method, _, form = name.partition(" ")
    quant = QuantName(method)
    if quant is QuantName.AUTO:
        return Request(quant, budget_bytes=int(form))
    if not form:
        return Request(quant)
    grid, _, size = form.partition("/")
    return Request(quant, int(size), GridName(grid))


def build(source: Path, name: str, folder: Path) -> None:
    """Build an engine and the quantized checkpoint that it is made of, in an empty folder."""
    for part in (_ENGINE, _WORK):
        (folder / part).mkdir()
    config = build_engine(
        open_checkpoint(source),
        request(name),
        folder / _ENGINE,
        profile="host",
        text=calibration_text(),
        work=folder / _WORK,
        canary=False,
    )
    (folder / _CONFIG_FILE).write_text(config.model_dump_json(), "utf-8")


def load(folder: Path) -> OurGraph:
    """The engine that `build` made, in the agent's own runner."""
    return OurGraph(folder / _ENGINE, _config(folder))


def sizes(folder: Path) -> Sizes:
    """Of all files that go into a bundle, and of the matrices of its layers."""
    directory = folder / _ENGINE
    regions: dict[tuple[str, int], int] = {}
    for node in ir.load(directory / _config(folder).files.graph).graph:
        if node.op_type in _NO_MATRIX or not (node.name or "").startswith("layer"):
            continue
        for value in node.inputs:
            tensor = value.const_value if value is not None else None
            if isinstance(tensor, ir.ExternalTensor):
                regions[str(tensor.location), tensor.offset or 0] = tensor.length or 0
    return Sizes(sum(path.stat().st_size for path in directory.iterdir()), sum(regions.values()))


def write_weights_only(folder: Path, original: Path, target: Path) -> None:
    """A float GGUF file of what the quantized checkpoint stands for; `original` has its settings."""
    checkpoint = open_quantized(folder / _WORK / "checkpoint")
    write_float_gguf(original, checkpoint.architecture, lambda name: _dequantized(checkpoint, name), target)


def _dequantized(checkpoint: QuantizedCheckpoint, name: str) -> NDArray[np.float32]:
    if name in {EMBEDDING, HEAD}:
        return checkpoint.rows(name, 0, checkpoint.architecture.vocab_size)
    if len(tensor_shapes(checkpoint.architecture)[name]) == 1:
        return checkpoint.vector(name)
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    linear = checkpoint.linear(int(layer), part)
    return linear if isinstance(linear, np.ndarray) else linear.dequantize()


def _config(folder: Path) -> EngineConfig:
    return EngineConfig.model_validate_json((folder / _CONFIG_FILE).read_text("utf-8"))


def main() -> int:
    """Builds in a process of its own, so that its memory can be told apart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_ours", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir()
    build(options.source, options.name, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
