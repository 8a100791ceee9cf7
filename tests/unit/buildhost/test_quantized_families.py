"""Every method can be written for every family, and what is read back is what the method made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgellm_buildhost.architecture import EMBEDDING, LINEARS
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.footprint import group_sum_bytes, stored_bytes
from edgellm_buildhost.graph.sources import unquantized_bytes
from edgellm_buildhost.quantization.grid import Grid, Rounding
from edgellm_buildhost.quantization.layer import QuantizedLayer
from edgellm_buildhost.quantize import Quantization
from edgellm_buildhost.quantized import CheckpointWriter, open_quantized
from edgellm_buildhost.recipe import QuantName, Request, recipe_for
from tests.support.tiny_families import CONFIGS, TOKENS, write_family
from tests.unit.buildhost.quantized_layers import floats

# A gain less the one that Gemma stores it without, and back: a rounding of float32 each.
GAIN_TOLERANCE = 1e-6


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedLayer]:
    """The layers that the method hands to the writer."""
    layers: list[QuantizedLayer] = []
    add_layer = CheckpointWriter.add_layer

    def keep(writer: CheckpointWriter, index: int, layer: QuantizedLayer) -> None:
        layers.append(layer)
        add_layer(writer, index, layer)

    monkeypatch.setattr(CheckpointWriter, "add_layer", keep)
    return layers


@pytest.mark.parametrize("quant", QuantName, ids=lambda quant: quant.value)
@pytest.mark.parametrize("family", CONFIGS)
def test_what_a_method_made_is_what_is_opened(
    family: str, quant: QuantName, made: list[QuantizedLayer], tmp_path: Path
) -> None:
    source = write_family(tmp_path / "float", family)
    checkpoint = open_checkpoint(source)
    shape = checkpoint.architecture
    budget = None
    if quant is QuantName.AUTO:  # enough for a closer grid at some points, and not at all
        widths = [shape.linear_shape(part) for part in LINEARS]
        linears = sum(stored_bytes(*width, Rounding(4, 32, Grid.INTEGER_ZERO)) for width in widths)
        sums = sum(group_sum_bytes(shape, Rounding(4, size, Grid.FLOAT_MINIMUM)) for size in (32, 64))
        budget = unquantized_bytes(shape) + sums + shape.layers * linears * 5 // 4
    recipe = recipe_for(Request(quant, budget_bytes=budget), shape)
    Quantization(checkpoint, recipe, "key", TOKENS[None]).write(tmp_path / "out", lambda *_: None)
    read = open_quantized(tmp_path / "out")
    assert read.architecture.layers == len(made)
    for index, layer in enumerate(made):
        for part, linear in layer.linears.items():
            found = read.linear(index, part)
            assert type(found) is type(linear)
            np.testing.assert_array_equal(floats(found), floats(linear))
        for part, values in layer.vectors.items():
            found_vector = read.vector(f"model.layers.{index}.{part}")
            if part.endswith(".bias"):
                np.testing.assert_array_equal(found_vector, values.astype(np.float16))
            else:
                np.testing.assert_allclose(found_vector, values, rtol=GAIN_TOLERANCE, atol=GAIN_TOLERANCE)
    table = checkpoint.tensor(EMBEDDING).astype(np.float16)
    np.testing.assert_array_equal(read.rows(EMBEDDING, 0, len(table)), table)
