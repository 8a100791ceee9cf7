"""The built graph says what a plain numpy decoder says with the same rounded weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.quantization.auto import Mixed
from edgellm_buildhost.quantization.grid import Grid, Rounding
from edgellm_buildhost.quantization.layer import Point
from edgellm_buildhost.quantization.rtn import RoundToNearest
from edgellm_buildhost.quantize import Quantization
from edgellm_buildhost.quantized import open_quantized
from edgellm_buildhost.recipe import QuantName, Recipe
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.reference import Engine, Floats, reference_logits, rounded_weights

# Products in float32: what is left is the order of additions, 1e-6 of logits of spread 8, layer by layer.
FLOAT_TOLERANCE = 2e-3
# Products of activations rounded to 8 bits: an error of up to 1/254 of a group's largest value each, 0.5 %
# of the spread of the logits on average; a wrong weight, position or mask moves them by the spread itself.
INTEGER_MEAN_TOLERANCE = 0.03

SHAPES = [
    pytest.param({"heads": 4, "kv_heads": 4}, id="as many key heads as query heads"),
    pytest.param({"heads": 4, "kv_heads": 2, "layers": 3}, id="two query heads share a key head"),
    pytest.param({"heads": 6, "kv_heads": 1, "tied": False}, id="one key head, a head of its own"),
    pytest.param(
        {"hidden": 96, "heads": 3, "kv_heads": 3, "head_dim": 32}, id="hidden size of no power of two"
    ),
    pytest.param({"ffn": 144}, id="last group of a row not full"),
    pytest.param({"ffn": 160, "head_dim": 32}, id="heads wider than the hidden size"),
]


@dataclass(frozen=True)
class Built:
    engine: Path
    expected: Floats
    ids: np.ndarray


def build(tmp_path: Path, shape: dict[str, int], precision: QuantName, accuracy_level: int) -> Built:
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "hf", **shape))
    engine = tmp_path / "engine"
    engine.mkdir()
    build_engine(checkpoint, precision, engine, profile="host", accuracy_level=accuracy_level)
    ids = np.random.default_rng(1).integers(0, checkpoint.architecture.vocab_size, 24)
    weights = rounded_weights(checkpoint, precision)
    return Built(engine, reference_logits(checkpoint.architecture, weights, ids), ids)


@pytest.fixture(params=[QuantName.INT4, QuantName.INT8], ids=lambda item: item.value)
def precision(request: pytest.FixtureRequest) -> QuantName:
    return request.param


@pytest.fixture(params=SHAPES)
def built(request: pytest.FixtureRequest, tmp_path: Path, precision: QuantName) -> Built:
    return build(tmp_path, request.param, precision, accuracy_level=0)


def past(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def test_a_whole_prompt_gives_the_logits_of_the_reference(built: Built) -> None:
    logits = Engine(built.engine).step(built.ids[None], past(0))
    np.testing.assert_allclose(logits, built.expected, atol=FLOAT_TOLERANCE)


def test_a_prompt_in_chunks_gives_the_same(built: Built) -> None:
    engine = Engine(built.engine)
    logits = [
        engine.step(built.ids[None, start:end], past(start))
        for start, end in ((0, 7), (7, 8), (8, 20), (20, 24))
    ]
    np.testing.assert_allclose(np.concatenate(logits), built.expected, atol=FLOAT_TOLERANCE)


def test_one_token_at_a_time_gives_the_same(built: Built) -> None:
    engine = Engine(built.engine)
    logits = [engine.step(built.ids[None, at : at + 1], past(at)) for at in range(len(built.ids))]
    np.testing.assert_allclose(np.concatenate(logits), built.expected, atol=FLOAT_TOLERANCE)


def test_rows_of_unequal_length_do_not_disturb_each_other(built: Built) -> None:
    lengths = (3, 11, 20)
    batch = Engine(built.engine, rows=len(lengths))
    for row, length in enumerate(lengths):
        single = Engine(built.engine)
        single.step(built.ids[None, :length], past(0))
        for name, cache in single.caches.items():
            batch.caches[name][row] = cache[0]
    for ahead in range(3):
        positions = [length + ahead for length in lengths]
        logits = batch.step(built.ids[positions][:, None], past(*positions))
        np.testing.assert_allclose(logits, built.expected[positions], atol=FLOAT_TOLERANCE)


def test_only_the_wanted_positions_get_logits_in_their_order(built: Built) -> None:
    wanted = np.array([17, 2, 23])
    logits = Engine(built.engine).step(built.ids[None], past(0), wanted)
    np.testing.assert_allclose(logits, built.expected[wanted], atol=FLOAT_TOLERANCE)


def test_a_chunk_without_wanted_positions_fills_the_cache_all_the_same(built: Built) -> None:
    engine = Engine(built.engine)
    logits = engine.step(built.ids[None, :20], past(0), np.array([], np.int64))
    assert logits.shape == (0, built.expected.shape[1])
    logits = engine.step(built.ids[None, 20:], past(20))
    np.testing.assert_allclose(logits, built.expected[20:], atol=FLOAT_TOLERANCE)


def test_a_step_touches_its_own_positions_of_the_cache_only(built: Built) -> None:
    engine = Engine(built.engine)
    engine.step(built.ids[None, :5], past(0))
    before = {name: cache[:, :, :5].copy() for name, cache in engine.caches.items()}
    engine.step(built.ids[None, 5:8], past(5))
    for name, cache in engine.caches.items():
        np.testing.assert_array_equal(cache[:, :, :5], before[name])
        assert np.isfinite(cache[:, :, 5:8]).all()
        assert np.isnan(cache[:, :, 8:]).all()


def test_integer_products_stay_within_their_margin(tmp_path: Path, precision: QuantName) -> None:
    built = build(tmp_path, {"layers": 3}, precision, accuracy_level=4)
    logits = Engine(built.engine).step(built.ids[None], past(0))
    error = np.abs(logits - built.expected).mean()
    assert error < INTEGER_MEAN_TOLERANCE * built.expected.std()
    # The option does something: rounded activations do differ from float32.
    assert error > FLOAT_TOLERANCE / 10


def test_equal_steps_give_equal_bits(tmp_path: Path) -> None:
    built = build(tmp_path, {}, QuantName.INT4, accuracy_level=4)
    first, second = (Engine(built.engine).step(built.ids[None], past(0)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_points_on_different_grids_and_groups_give_the_logits_of_the_reference(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "hf", hidden=128, ffn=256, head_dim=32, layers=4))
    grids = [(4, 64, Grid.FLOAT_MINIMUM), (4, 32, Grid.FLOAT_MINIMUM), (8, 64, Grid.SYMMETRIC)]
    grids += [(4, 32, Grid.INTEGER_ZERO), (4, 128, Grid.SYMMETRIC)]
    places = [(layer, point) for layer in range(4) for point in Point]
    choice = {place: Rounding(*grids[number % len(grids)]) for number, place in enumerate(places)}
    method = Mixed(RoundToNearest(choice[places[0]]), choice)
    Quantization(checkpoint, Recipe(method, "mixed"), "key").write(tmp_path / "quantized", lambda *_: None)
    (tmp_path / "engine").mkdir()
    quantized = open_quantized(tmp_path / "quantized")
    config = build_engine(quantized, None, tmp_path / "engine", profile="host", accuracy_level=0)
    ids = np.random.default_rng(1).integers(0, checkpoint.architecture.vocab_size, 24)
    expected = reference_logits(checkpoint.architecture, rounded_weights(checkpoint, method), ids)
    logits = Engine(tmp_path / "engine").step(ids[None], past(0))
    np.testing.assert_allclose(logits, expected, atol=FLOAT_TOLERANCE)
    assert (config.precision.weights, config.precision.group_size) == ("mixed", None)
