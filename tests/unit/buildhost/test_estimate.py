"""What is said of an engine before it is built is what its build then says; what cannot fit is not begun."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.bundle import EngineConfig
from edgellm.errors import DoesNotFitError
from edgellm.fits import Board, fit
from edgellm.memory import plan_memory
from edgellm.profiles import load_profile
from edgellm_buildhost.architecture import Architecture, AttentionKind, tensor_shapes
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.estimate import (
    QUANTIZATIONS,
    Model,
    check_fits,
    estimates,
    estimates_of,
    form_of,
    read_model,
)
from edgellm_buildhost.footprint import LinearForm, weights_bytes
from edgellm_buildhost.graph.decoder import write_decoder
from edgellm_buildhost.graph.onnxruntime import OnnxRuntimeDialect
from edgellm_buildhost.graph.sources import QuantizedWeights
from edgellm_buildhost.graph.weights import WeightShards
from edgellm_buildhost.quantization.grid import Grid, quantize
from edgellm_buildhost.quantization.layer import Int8Tensor, Linear
from edgellm_buildhost.quantized.base import QuantizedCheckpoint
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_models import make_tiny_gguf, make_tiny_hf

CONFIGS = Path("tests/data/configs")
SMOLLM2 = Path(".edgellm/models/SmolLM2-135M-Instruct.Q4_1.gguf")
QUANTS = [QuantName.INT4, QuantName.INT8]
SHAPES = [
    pytest.param({}, id="tied head"),
    pytest.param({"tied": False}, id="a head of its own"),
    pytest.param({"heads": 8, "kv_heads": 1}, id="one key head"),
    pytest.param({"ffn": 192, "layers": 3}, id="three layers"),
    pytest.param({"ffn": 2112}, id="more groups than a group has columns"),
]


def estimated(source: Path, quantization: str, kv: KvName) -> EngineConfig:
    (found,) = (
        each.config
        for each in estimates(source)
        if (each.quantization, each.config.precision.kv) == (quantization, kv.value)
    )
    return found


def built(source: Path, directory: Path, precision: QuantName, kv: KvName) -> EngineConfig:
    directory.mkdir()
    return build_engine(open_checkpoint(source), precision, directory, profile="host", kv=kv, canary=False)


@pytest.mark.parametrize("precision", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_the_config_that_the_build_writes(
    tmp_path: Path, shape: dict[str, int], precision: QuantName
) -> None:
    source = make_tiny_hf(tmp_path / "tiny-f16", **shape)
    for kv in KvName:
        made = built(source, tmp_path / kv.value, precision, kv)
        assert estimated(source, precision.value, kv) == (made)


def test_the_estimate_of_a_calibrated_build_is_too(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    made = built(source, tmp_path / "engine", QuantName.INT4_GPTQ, KvName.FLOAT32)
    assert estimated(source, "int4-gptq", KvName.FLOAT32) == (made)


def test_the_estimate_of_a_gguf_file_is_too(tmp_path: Path) -> None:
    source = make_tiny_gguf(tmp_path / "tiny.Q8_0.gguf")
    made = built(source, tmp_path / "engine", QuantName.INT4, KvName.FLOAT32)
    assert estimated(source, "int4", KvName.FLOAT32) == (made)


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    whole = estimated(source, "int8", KvName.INT8)
    for path in source.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert estimated(source / "config.json", "int8", KvName.INT8).footprint == whole.footprint
    assert estimated(source, "int8", KvName.INT8) == whole


def test_without_a_tokenizer_a_chat_template_is_counted_in(tmp_path: Path) -> None:
    source = make_tiny_hf(tmp_path / "tiny")
    assert read_model(source).chat_template
    (source / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    model = read_model(source)
    assert not model.chat_template
    assert model.tokens.add_bos
    (source / "tokenizer.json").unlink()
    assert read_model(source).chat_template


@pytest.mark.real_model
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make model` fetches the weights")
@pytest.mark.parametrize("precision", QUANTS)
def test_the_estimate_of_a_real_model_is_exact(tmp_path: Path, precision: QuantName) -> None:
    made = built(SMOLLM2, tmp_path / "engine", precision, KvName.FLOAT32)
    assert estimated(SMOLLM2, precision.value, KvName.FLOAT32) == (made)
    from_config = estimated(CONFIGS / "smollm2-135m", precision.value, KvName.FLOAT32)
    assert (from_config.footprint, from_config.model) == (made.footprint, made.model)


class Zeros(QuantizedCheckpoint):
    """Linears of nothing but zeros, in one form."""

    scheme = "none"

    def __init__(self, architecture: Architecture, form: LinearForm) -> None:
        self.name, self.architecture, self._form = "zeros", architecture, form

    def linear(self, layer: int, part: str) -> Linear:
        shape, size = self.architecture.linear_shape(part), self._form.group_size
        if size is None:
            return Int8Tensor(np.zeros(shape, np.int8), np.ones(shape[0], np.float32), 1.0)
        minima = self._form.minima and shape[1] % size == 0
        grid = Grid.FLOAT_MINIMUM if minima else Grid.INTEGER_ZERO
        return quantize(np.zeros(shape, np.float32), self._form.bits, size, grid)

    def vector(self, name: str) -> np.ndarray:
        return np.ones(tensor_shapes(self.architecture)[name], np.float32)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, self.architecture.hidden_size), np.float32)


def architecture(**changes: object) -> Architecture:
    layers = int(changes.get("layers", 2))
    plain = Architecture(
        family="llama",
        layers=layers,
        hidden_size=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_size=128,
        vocab_size=300,
        context_length=2048,
        rms_epsilon=1e-5,
        tied_embedding=True,
        attention=(AttentionKind((1.0,) * 8),) * layers,
        attention_scale=0.25,
    )
    return replace(plain, **changes)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    kv_heads = draw(st.integers(1, 4))
    return architecture(
        layers=draw(st.integers(1, 3)),
        hidden_size=16 * draw(st.integers(1, 20)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        ffn_size=16 * draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(1, 400)),
        tied_embedding=draw(st.booleans()),
        context_length=16,
    )


@pytest.mark.parametrize("quantization", [*QUANTIZATIONS, "int4-gptq", "int8-smoothquant"])
@settings(max_examples=15, deadline=None)
@given(shape=architectures())
def test_weights_are_counted_as_the_graph_loads_them(shape: Architecture, quantization: str) -> None:
    form = form_of(shape, quantization)
    with tempfile.TemporaryDirectory() as directory, WeightShards(Path(directory)) as shards:
        dialect = OnnxRuntimeDialect(shape, shards)
        write_decoder(shape, QuantizedWeights(Zeros(shape, form)), dialect, lambda _done, _total: None)
    assert weights_bytes(shape, form) == dialect.loaded_bytes


@pytest.mark.parametrize(
    ("hidden", "ffn", "group"),
    [(256, 1024, 128), (256, 960, 64), (576, 1536, 64), (96, 1024, 32), (80, 1024, 16)],
)
def test_a_symmetric_group_divides_every_row_where_one_can(hidden: int, ffn: int, group: int) -> None:
    shape = architecture(hidden_size=hidden, heads=hidden // 16, ffn_size=ffn)
    assert form_of(shape, "int4-awq") == form_of(shape, "int4-gptq") == LinearForm(4, group)


def test_larger_groups_take_less_memory_and_int8_takes_most() -> None:
    shape = read_model(CONFIGS / "mistral-7b").architecture
    names = ("int4-awq", "int4", "int8-smoothquant", "int8")
    sizes = [weights_bytes(shape, form_of(shape, name)) for name in names]
    assert sizes == sorted(sizes)


def test_a_plan_of_the_estimate_holds_on_the_device() -> None:
    board = Board.of(load_profile("orin-nano-8gb"))
    for each in estimates(CONFIGS / "llama-3.2-1b"):
        found = fit(board, each, max_sequences=4)
        granted = plan_memory(
            each.config,
            available_bytes=board.available_bytes,
            headroom_bytes=board.headroom_bytes,
            context_tokens=found.largest_context_tokens,
            max_sequences=4,
        )
        assert found.fits
        assert granted.context_tokens == found.largest_context_tokens
        assert granted.kv_bytes == found.kv_bytes


def mistral() -> Architecture:
    return read_model(CONFIGS / "mistral-7b").architecture


def test_a_build_that_fits_goes_on() -> None:
    check_fits(mistral(), "int4", KvName.FLOAT32, load_profile("orin-nx-16gb"))
    check_fits(mistral(), "int4-gptq", KvName.INT8, load_profile("orin-nx-16gb"), context_tokens=8192)


def test_a_machine_without_a_limit_takes_any_build() -> None:
    check_fits(
        mistral(), "int8", KvName.FLOAT32, load_profile("host"), context_tokens=32768, max_sequences=99
    )


def test_a_build_that_cannot_fit_is_refused_with_what_would() -> None:
    profile = load_profile("orin-nx-16gb")
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(mistral(), "int4", KvName.FLOAT32, profile, context_tokens=16384, max_sequences=2)
    error = caught.value
    assert error.available_bytes == profile.usable_bytes < error.needed_bytes
    assert "2 sequences of 16384 tokens" in error.message
    assert error.hint == (
        "what fits: int4 KV int8; int4-gptq KV int8; int8 KV int8; 11784 tokens of context; "
        "1 sequence at once; agx-orin-32gb or larger"
    )


def test_each_way_that_the_hint_names_does_fit() -> None:
    profile = load_profile("orin-nx-16gb")
    asked = {"context_tokens": 16384, "max_sequences": 2}
    check_fits(mistral(), "int8", KvName.INT8, profile, **asked)
    check_fits(mistral(), "int4", KvName.FLOAT32, profile, context_tokens=11784, max_sequences=2)
    check_fits(mistral(), "int4", KvName.FLOAT32, profile, context_tokens=16384, max_sequences=1)
    check_fits(mistral(), "int4", KvName.FLOAT32, load_profile("agx-orin-32gb"), **asked)
    with pytest.raises(DoesNotFitError):
        check_fits(mistral(), "int4-awq", KvName.FLOAT32, profile, **asked)


def test_without_a_context_the_shortest_that_a_device_accepts_has_to_fit() -> None:
    with pytest.raises(DoesNotFitError, match="1 sequence of 256 tokens"):
        check_fits(mistral(), "int8", KvName.INT8, load_profile("orin-nano-8gb"))


def test_what_no_board_holds_is_said_to_be_too_large() -> None:
    giant = replace(mistral(), layers=4000)
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(giant, "int4", KvName.INT8, load_profile("thor-t5000"))
    assert "smaller model" in caught.value.hint


def test_a_quantization_that_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="int2"):
        check_fits(mistral(), "int2", KvName.INT8, load_profile("thor-t5000"))


def test_a_form_of_one_s_own_counts_instead_of_the_quantization_s() -> None:
    board, small = load_profile("orin-nano-8gb"), LinearForm(bits=4, group_size=256)
    check_fits(mistral(), "int4-awq", KvName.INT8, board, form=small)
    with pytest.raises(DoesNotFitError):
        check_fits(mistral(), "int4-awq", KvName.INT8, board, form=LinearForm(bits=4, group_size=16))


def wrong_sources(directory: Path) -> Iterator[tuple[Path, str, str]]:
    """A source, and what its error has to name and to advise."""
    yield directory / "nowhere", "no such file", "Hugging Face directory"
    yield directory, "config.json: missing", "directory"
    text = directory / "notes.json"
    text.write_text("{")
    yield text, "notes.json: not JSON", "fetch"
    weights = directory / "model.safetensors"
    weights.write_bytes(b"\0" * (5 << 20))
    yield weights, "neither a GGUF file nor a config.json", "config.json"
    plain = json.loads((CONFIGS / "smollm2-135m" / "config.json").read_text())
    for number, (change, message) in enumerate(
        (
            ({"model_type": "mamba"}, "model_type 'mamba'"),
            ({"model_type": None}, "model_type None"),
            ({"hidden_size": -1}, "hidden_size should be a positive integer"),
            ({"head_dim": 24}, "head_dim 24 is no multiple of 16"),
            ({"hidden_size": 584, "head_dim": 64}, "hidden_size 584 is no multiple of 16"),
        )
    ):
        changed = directory / f"changed-{number}.json"
        changed.write_text(json.dumps(plain | change))
        yield changed, message, ""
    cut = directory / "cut.gguf"
    cut.write_bytes(b"GGUF\3\0")
    yield cut, "damaged or cut short", "fetch"


def test_a_source_that_cannot_be_built_is_one_clear_error(tmp_path: Path) -> None:
    for source, message, hint in wrong_sources(tmp_path):
        with pytest.raises(BuildError) as caught:
            estimates(source)
        assert message in caught.value.message
        assert hint in caught.value.hint
        assert "\n" not in caught.value.message + caught.value.hint


def test_only_the_precision_differs_between_the_estimates_of_one_model() -> None:
    found = estimates_of(Model("tiny", architecture()))
    assert len({each.label for each in found}) == len(found) == len(QUANTIZATIONS) * len(KvName)
    assert len({each.config.name for each in found}) == len(found)
    assert {each.config.model for each in found} == {found[0].config.model}
