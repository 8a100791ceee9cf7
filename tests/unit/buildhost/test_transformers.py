"""Every family: our graph computes what transformers computes for the same tiny checkpoint.

What transformers gave is recorded (`scripts/transformers_logits.py`), so torch is not needed here; where
there is transformers, the records are made again and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from packaging.version import Version

from edgellm_buildhost.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    Activation,
    Architecture,
    layer_tensor,
)
from edgellm_buildhost.checkpoint import Checkpoint, open_checkpoint
from edgellm_buildhost.graph.decoder import Weights, write_decoder
from edgellm_buildhost.graph.layer import layer_graph
from edgellm_buildhost.graph.onnxruntime import OnnxRuntimeDialect
from edgellm_buildhost.graph.sources import FloatWeights
from edgellm_buildhost.graph.weights import WeightShards
from edgellm_buildhost.quantization.grid import Bits, Grid, KvScales, quantize
from edgellm_buildhost.quantization.layer import FloatLayer, Linear
from tests.support.tiny_families import CONFIGS, POSITIONS, TOKENS, write_family
from tests.unit.buildhost.reference import Engine, Floats

RECORDS = Path(__file__).resolve().parents[2] / "data" / "transformers"
# Logits of spread 1 in float32.
TOLERANCE = 1e-4
# One set of weights, as codes and as the floats that they stand for: what is left is the order of additions.
DEQUANTIZED_TOLERANCE = 1e-4
# Keys and values with 8 bits; a window that is off by one moves logits by more than 1.
INTEGER_CACHE_MEAN_TOLERANCE = 0.02
takes_ragged_rows = Version(ort.__version__) >= Version("1.32")
Change = Callable[[Architecture], Architecture]


@dataclass(frozen=True)
class Built:
    engine: Path
    expected: Floats


@cache
def recorded(name: str) -> Floats:
    with np.load(RECORDS / f"{name}.npz") as record:
        return np.asarray(record["logits"])


def write_engine(
    checkpoint: Checkpoint, weights: Weights, directory: Path, scales: KvScales | None = None
) -> Path:
    directory.mkdir()
    with WeightShards(directory) as shards:
        dialect = OnnxRuntimeDialect(checkpoint.architecture, shards, accuracy_level=0)
        write_decoder(checkpoint.architecture, weights, dialect, lambda *_: None)
    dialect.save(directory / "model.onnx")
    dialect.accept_ragged_rows()
    if scales is not None:
        dialect.store_cache_as_int8(scales)
    dialect.save(directory / "model-ragged.onnx")
    return directory


@pytest.fixture(params=list(CONFIGS), scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(write_family(folder / "hf", request.param))
    engine = write_engine(checkpoint, FloatWeights(checkpoint), folder / "engine")
    return Built(engine, recorded(request.param))


def past(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int32)


def assert_close(logits: Floats, expected: Floats, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


def in_one_prefill(engine: Path) -> Floats:
    return Engine(engine).step(TOKENS[None], past(0), np.array(POSITIONS))


def test_a_whole_prompt_gives_the_logits_of_transformers(built: Built) -> None:
    assert_close(in_one_prefill(built.engine), built.expected)


def test_a_prompt_in_chunks_and_single_tokens_gives_the_same(built: Built) -> None:
    engine = Engine(built.engine)
    bounds = [0, 5, 6, 13, *range(14, len(TOKENS) + 1)]
    logits = [engine.step(TOKENS[None, start:end], past(start)) for start, end in pairwise(bounds)]
    assert_close(np.concatenate(logits)[list(POSITIONS)], built.expected)


def test_rows_of_different_lengths_decode_together(built: Built) -> None:
    lengths = (10, 17, 21)
    batch = Engine(built.engine, rows=len(lengths))
    for row, length in enumerate(lengths):
        single = Engine(built.engine)
        single.step(TOKENS[None, :length], past(0))
        for name, filled in single.caches.items():
            batch.caches[name][row] = filled[0]
    for ahead in range(3):
        positions = [length + ahead for length in lengths]
        logits = batch.step(TOKENS[positions][:, None], past(*positions))
        assert_close(logits, built.expected[[POSITIONS.index(at) for at in positions]])


@pytest.mark.skipif(not takes_ragged_rows, reason="this version takes no rows of several tokens")
def test_rows_take_different_numbers_of_tokens_in_one_step(built: Built) -> None:
    starts, ends = (0, 0, 12), (24, 11, 20)
    engine = Engine(built.engine, graph="model-ragged.onnx", rows=len(starts))
    engine.step(np.tile(TOKENS[:12], (3, 1)), past(0, 0, 0), query=past(1, 1, 12))
    width = max(end - start for start, end in zip(starts, ends, strict=True))
    ids = np.zeros((3, width), np.int64)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        ids[row, : end - start] = TOKENS[start:end]
    logits = engine.step(ids, past(*starts), query=past(*np.subtract(ends, starts))).reshape(3, width, -1)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        wanted = [at for at in POSITIONS if start <= at < end]
        assert_close(
            logits[row, np.array(wanted) - start], built.expected[[POSITIONS.index(at) for at in wanted]]
        )


@pytest.mark.skipif(not takes_ragged_rows, reason="this version has no INT8 KV cache")
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "phi3-partial"])
def test_an_integer_cache_keeps_windows_caps_and_norms(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "hf", name))
    floats = Engine(
        write_engine(checkpoint, FloatWeights(checkpoint), tmp_path / "floats"), capacity=len(TOKENS)
    )
    floats.step(TOKENS[None], past(0))
    layers = range(checkpoint.architecture.layers)
    keys, values = (
        np.stack([np.abs(floats.caches[f"kv_{kind}_{layer}"][0]).max(axis=1) / 127 for layer in layers])
        for kind in ("key", "value")
    )
    engine = Engine(
        write_engine(checkpoint, FloatWeights(checkpoint), tmp_path / "codes", KvScales(keys, values)),
        graph="model-ragged.onnx",
    )
    prefill = engine.step(TOKENS[None, :16], past(0))
    decode = [engine.step(TOKENS[None, at : at + 1], past(at)) for at in range(16, len(TOKENS))]
    error = np.abs(np.concatenate([prefill, *decode])[list(POSITIONS)] - recorded(name))
    assert error.mean() < INTEGER_CACHE_MEAN_TOLERANCE
    assert error.max() > TOLERANCE


def test_the_graph_for_all_versions_does_without_the_window_that_they_disagree_on(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "hf", "gemma3"))
    engine = write_engine(checkpoint, FloatWeights(checkpoint), tmp_path / "engine")
    portable, ragged = (
        onnx.load(engine / title, load_external_data=False).graph
        for title in ("model.onnx", "model-ragged.onnx")
    )
    assert windows_in(portable) == [None] * 4
    assert windows_in(ragged) == [6, 6, None, 6]
    # What made the bias is gone: ONNX Runtime warns of initializers that nothing reads.
    read = {name for node in ragged.node for name in node.input}
    assert {item.name for item in ragged.initializer} <= read
    assert not [node.name for node in ragged.node if node.name.startswith("window")]


def windows_in(graph: onnx.GraphProto) -> list[int | None]:
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    attributes = [{item.name: item.i for item in node.attribute} for node in attentions]
    return [of_node.get("local_window_size") for of_node in attributes]


class RoundedWeights(FloatWeights):
    """The linear maps of a checkpoint, rounded; as codes, or as the floats that these stand for."""

    def __init__(self, checkpoint: Checkpoint, bits: Bits, as_floats: bool) -> None:
        super().__init__(checkpoint)
        self._bits: Bits = bits
        self._as_floats = as_floats

    def linear(self, layer: int, part: str) -> Linear:
        weight = super().linear(layer, part)
        assert isinstance(weight, np.ndarray)
        rounded = quantize(weight, self._bits, 32, Grid.SYMMETRIC)
        return rounded.dequantize() if self._as_floats else rounded


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_graph_computes_with_the_dequantized_weights(
    tmp_path: Path, name: str, bits: Bits
) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "hf", name))
    floats, codes = (
        in_one_prefill(write_engine(checkpoint, RoundedWeights(checkpoint, bits, form), tmp_path / str(form)))
        for form in (True, False)
    )
    assert_close(codes, floats, DEQUANTIZED_TOLERANCE)
    # Rounding does move the logits, so the two graphs are not the unrounded one.
    assert np.abs(floats - recorded(name)).max() > 10 * DEQUANTIZED_TOLERANCE


def windows_longer_by(positions: int) -> Change:
    return lambda shape: replace(
        shape,
        attention=tuple(
            replace(kind, sliding_window=kind.sliding_window and kind.sliding_window + positions)
            for kind in shape.attention
        ),
    )


def one_rotation(shape: Architecture) -> Architecture:
    steps = shape.attention[0].inverse_frequencies
    return replace(
        shape, attention=tuple(replace(kind, inverse_frequencies=steps) for kind in shape.attention)
    )


MISTAKES: dict[str, tuple[str, Change]] = {
    "a window too long by one": ("mistral", windows_longer_by(1)),
    "a window too short by one": ("gemma2", windows_longer_by(-1)),
    "no cap on scores": ("gemma2", lambda shape: replace(shape, attention_softcap=None)),
    "no cap on logits": ("gemma2", lambda shape: replace(shape, logit_softcap=None)),
    "another activation": ("gemma2", lambda shape: replace(shape, activation=Activation.SILU)),
    "another epsilon": ("gemma3", lambda shape: replace(shape, rms_epsilon=1e-5)),
    "an embedding that is not scaled": ("gemma3", lambda shape: replace(shape, embedding_scale=None)),
    "another scale of scores": ("gemma3", lambda shape: replace(shape, attention_scale=32**-0.5)),
    "one rotation for all layers": ("gemma3", one_rotation),
    "no norm of heads": ("qwen3", lambda shape: replace(shape, qk_norm=False)),
    "no biases": ("llama-biases", lambda shape: replace(shape, biases=frozenset())),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_notices(mistake: str, tmp_path: Path) -> None:
    name, change = MISTAKES[mistake]
    checkpoint = open_checkpoint(write_family(tmp_path / "hf", name))
    checkpoint.architecture = change(checkpoint.architecture)
    logits = in_one_prefill(write_engine(checkpoint, FloatWeights(checkpoint), tmp_path / "engine"))
    assert np.abs(logits - recorded(name)).max() > 50 * TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_one_by_one_give_the_logits_of_the_whole(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write_family(tmp_path / "hf", name))
    shape = checkpoint.architecture
    hidden = checkpoint.tensor(EMBEDDING)[TOKENS][None] * np.float32(shape.embedding_scale or 1.0)
    for layer in range(shape.layers):
        hidden = behind_layer(checkpoint, layer, hidden)
    normed = hidden[0] / np.sqrt((hidden[0] ** 2).mean(axis=1, keepdims=True) + shape.rms_epsilon)
    head = checkpoint.tensor(EMBEDDING if shape.tied_embedding else HEAD)
    logits = normed * checkpoint.tensor(FINAL_NORM) @ head.T
    if shape.logit_softcap is not None:
        logits = np.tanh(logits / shape.logit_softcap) * shape.logit_softcap
    assert_close(logits[list(POSITIONS)], recorded(name))


def behind_layer(checkpoint: Checkpoint, layer: int, hidden: Floats) -> Floats:
    shape, tokens = checkpoint.architecture, hidden.shape[1]
    floats = FloatLayer(
        {part: checkpoint.tensor(layer_tensor(layer, part)) for part in LINEARS},
        {part: checkpoint.tensor(f"model.layers.{layer}.{part}") for part in shape.vectors()},
    )
    graph = layer_graph(shape, layer, floats, tokens)
    session = ort.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
    cache = np.zeros((1, shape.kv_heads, tokens, shape.head_dim), np.float32)
    feeds = [hidden, past(0), past(tokens), cache, cache.copy(), *graph.weights]
    names = [item.name for item in session.get_inputs()]
    return np.asarray(session.run(None, dict(zip(names, feeds, strict=True)))[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_records_are_what_transformers_gives(tmp_path: Path, name: str) -> None:
    pytest.importorskip("transformers")
    from scripts.transformers_logits import transformers_logits

    assert_close(transformers_logits(write_family(tmp_path / "hf", name)), recorded(name), 1e-5)
