"""Linears that read the same inputs may have different forms; the graph computes these apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgellm_buildhost.architecture import DOWN, GATE, KEY, LINEARS, OUTPUT, QUERY, UP, VALUE
from edgellm_buildhost.graph.decoder import Weights, write_decoder
from edgellm_buildhost.graph.dialect import Table
from edgellm_buildhost.graph.onnxruntime import OnnxRuntimeDialect
from edgellm_buildhost.graph.sources import QuantizedWeights
from edgellm_buildhost.graph.weights import WeightShards
from edgellm_buildhost.quantization.grid import Grid
from edgellm_buildhost.quantization.layer import Linear
from edgellm_buildhost.quantized import QuantizedCheckpoint, open_quantized
from tests.support.tiny_families import TOKENS, write_family
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.published_layouts import AWQ, awq_tensors, made_of
from tests.unit.buildhost.quantized_layers import floats, int8_products, on_grid, symmetric, write
from tests.unit.buildhost.reference import Engine, Floats

# One set of weights, as codes and as the floats that they stand for: what is left is the order of additions.
TOLERANCE = 2e-3

DIFFERENT = {
    QUERY: symmetric(4),
    KEY: symmetric(8),
    VALUE: on_grid(4, Grid.INTEGER_ZERO),
    OUTPUT: symmetric(4),
    GATE: on_grid(8, Grid.FLOAT_MINIMUM),
    UP: symmetric(4),
    DOWN: symmetric(8),
}
ALIKE = dict.fromkeys(LINEARS, symmetric(4))


@dataclass(frozen=True)
class Dequantized:
    """The floats that the codes stand for; floats of one kind are one product."""

    weights: QuantizedWeights

    def linear(self, layer: int, part: str) -> Linear:
        return floats(self.weights.linear(layer, part))

    def vector(self, name: str) -> NDArray[np.float32]:
        return self.weights.vector(name)

    def table(self, name: str) -> Table:
        return self.weights.table(name)


def graph(checkpoint: QuantizedCheckpoint, weights: Weights, directory: Path) -> Path:
    directory.mkdir()
    with WeightShards(directory) as shards:
        dialect = OnnxRuntimeDialect(checkpoint.architecture, shards, accuracy_level=0)
        write_decoder(checkpoint.architecture, weights, dialect, lambda *_: None)
    dialect.save(directory / "model.onnx")
    return directory


def logits(checkpoint: QuantizedCheckpoint, directory: Path) -> tuple[Floats, Floats]:
    """Of the codes, and of the floats that they stand for."""
    weights = QuantizedWeights(checkpoint)
    codes = graph(checkpoint, weights, directory / "codes")
    dense = graph(checkpoint, Dequantized(weights), directory / "dense")
    first = np.zeros(1, np.int32)
    found, expected = (Engine(engine).step(TOKENS[None], first) for engine in (codes, dense))
    return found, expected


def products(engine: Path) -> list[str]:
    """The names of the products of layer 0."""
    nodes = onnx.load(engine / "model.onnx", load_external_data=False).graph.node
    return [node.name for node in nodes if node.op_type == "MatMulNBits" and node.name.startswith("layer0.")]


@pytest.mark.parametrize("family", ["llama2", "llama-biases", "qwen3", "gemma3"])
def test_linears_in_different_forms_give_the_logits_of_their_floats(family: str, tmp_path: Path) -> None:
    source = write_family(tmp_path / "float", family)
    read = open_quantized(write(tmp_path / "quantized", source, DIFFERENT))
    found, expected = logits(read, tmp_path)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert products(tmp_path / "codes") == [
        "layer0.qkv.q_proj",
        "layer0.qkv.k_proj",
        "layer0.qkv.v_proj",
        "layer0.attention_out",
        "layer0.gate_up.gate_proj",
        "layer0.gate_up.up_proj",
        "layer0.down",
    ]


def test_linears_in_one_form_are_one_product(tmp_path: Path) -> None:
    source = write_family(tmp_path / "float", "llama2")
    read = open_quantized(write(tmp_path / "quantized", source, ALIKE))
    engine = graph(read, QuantizedWeights(read), tmp_path / "engine")
    assert products(engine) == ["layer0.qkv", "layer0.attention_out", "layer0.gate_up", "layer0.down"]


def test_one_linear_that_was_left_unquantized_is_a_product_of_its_own(tmp_path: Path) -> None:
    directory, _ = made_of(tmp_path / "awq", AWQ, awq_tensors)
    path, module = directory / "model.safetensors", f"model.layers.0.{VALUE}"
    kept = {name: array for name, array in load_file(path).items() if not name.startswith(module)}
    values = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float16)
    save_file(kept | {f"{module}.weight": values}, path)
    found, expected = logits(open_quantized(directory), tmp_path)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_inputs_of_one_point_may_be_rounded_by_different_scales(tmp_path: Path) -> None:
    directory = write(tmp_path / "int8", make_tiny_hf(tmp_path / "float"), int8_products)
    together = open_quantized(directory)
    alike = graph(together, QuantizedWeights(together), tmp_path / "alike")
    shard = directory / "model-00001-of-00003.safetensors"
    next_scale = np.nextafter(
        np.float32(0.0625), np.float32(1)
    )  # another one, which rounds to the same codes
    save_file(load_file(shard) | {f"model.layers.0.{KEY}.input_scale": np.array(next_scale)}, shard)
    apart = open_quantized(directory)
    different = graph(apart, QuantizedWeights(apart), tmp_path / "different")
    first = np.zeros(1, np.int32)
    found, expected = (Engine(engine).step(TOKENS[None], first) for engine in (different, alike))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
