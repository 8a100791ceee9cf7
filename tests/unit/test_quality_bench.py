"""The quality benchmark measures what it says: another basis is the same model, and the figures are exact."""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks.big_model import seven_billion, write_random_model
from benchmarks.peak_memory import peak_memory
from benchmarks.quality_figures import Figures, Reference
from benchmarks.quality_gguf import float_gguf_of, sizes
from benchmarks.quality_model import BASES, tilted, write_in_basis
from benchmarks.quality_ours import NAMES, request
from benchmarks.quality_table import Entry, contests, to_markdown
from edgellm_buildhost.architecture import DOWN, GATE, OUTPUT, QUERY, layer_tensor, tensor_shapes
from edgellm_buildhost.calibration.text import calibration_text, held_out_text
from edgellm_buildhost.checkpoint.open import open_checkpoint
from edgellm_buildhost.quantization.grid import Grid, quantize
from tests.support.tiny_models import make_tiny_gguf, make_tiny_hf
from tests.unit.buildhost.reference import reference_logits

IDS = np.array([5, 17, 200, 3, 3, 90, 41, 255, 6, 7], np.int64)


def logits(checkpoint):
    weights = {name: checkpoint.tensor(name) for name in tensor_shapes(checkpoint.architecture)}
    return reference_logits(checkpoint.architecture, weights, IDS)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_another_basis_computes_the_same(tmp_path, kind, tied):
    original = open_checkpoint(make_tiny_hf(tmp_path / "original", tied=tied))
    write_in_basis(original, kind, tmp_path / "other", seed=7)
    other = open_checkpoint(tmp_path / "other")
    assert np.abs(logits(other) - logits(original)).max() < 1e-4
    name = layer_tensor(0, GATE)
    assert np.abs(other.tensor(name) - original.tensor(name)).max() > 0.01
    assert not other.architecture.tied_embedding


def test_a_peer_s_float_file_has_the_weights_of_the_directory_bit_by_bit(tmp_path):
    original = make_tiny_gguf(tmp_path / "tiny.gguf", quantization="Q4_1")
    write_in_basis(open_checkpoint(original), "tilted", tmp_path / "other")
    float_gguf_of(tmp_path / "other", original, tmp_path / "F32.gguf")
    directory, file = open_checkpoint(tmp_path / "other"), open_checkpoint(tmp_path / "F32.gguf")
    shapes = tensor_shapes(directory.architecture)
    assert tensor_shapes(file.architecture) == shapes
    assert all(np.array_equal(file.tensor(name), directory.tensor(name)) for name in shapes)
    assert file.tokenizer == open_checkpoint(original).tokenizer
    matrices = [dims for name, dims in shapes.items() if "_proj" in name]
    assert sizes(tmp_path / "F32.gguf").linear_bytes == 4 * sum(map(math.prod, matrices))


def step_error(checkpoint, part):
    """Root mean square of what rounding to Q4_1's grid costs, in steps of the grid."""
    weight = checkpoint.tensor(layer_tensor(0, part))
    rounded = quantize(weight, 4, 32, Grid.FLOAT_MINIMUM)
    steps = np.repeat(rounded.scales, 32, axis=1)
    return float(np.sqrt((((rounded.dequantize() - weight) / steps) ** 2).mean()))


@pytest.mark.parametrize("kind", BASES)
def test_weights_in_another_basis_have_forgotten_the_grid_they_came_from(tmp_path, kind):
    path = make_tiny_gguf(tmp_path / "tiny.gguf", hidden=256, ffn=256, quantization="Q4_1")
    original = open_checkpoint(path)
    write_in_basis(original, kind, tmp_path / "other")
    other = open_checkpoint(tmp_path / "other")
    # Evenly distributed, with the two outermost weights of each group on the grid by its definition.
    even = math.sqrt(30 / 32 / 12)
    for part in (QUERY, GATE, OUTPUT, DOWN):
        assert step_error(original, part) < 0.01
        assert step_error(other, part) == pytest.approx(even, rel=0.03)


def test_a_tilted_basis_keeps_which_channels_are_large():
    matrix = tilted(256, seed=1).matrix
    assert np.allclose(matrix @ matrix.T, np.eye(256), atol=1e-12)
    kept = np.diag(matrix) ** 2
    assert kept.mean() == pytest.approx(0.96, abs=0.005)
    assert kept.min() > 0.9


def test_nothing_that_is_held_out_was_calibrated_with():
    def phrases(text):
        words = text.content.split()
        return {tuple(words[start : start + 12]) for start in range(len(words) - 12)}

    held_out, calibration = phrases(held_out_text()), phrases(calibration_text())
    assert len(held_out & calibration) < 0.01 * len(held_out)
    assert len(calibration) > 2 * len(held_out)


class Table:
    """A GraphModel that knows the logits of every token by heart."""

    name, step_bytes = "table", 0

    def __init__(self, rows):
        self.rows = np.asarray(rows, np.float32)

    def prefill(self, stream, tokens, past_len, *, every=False):
        assert (stream, past_len, every) == (0, 0, True)
        return self.rows[list(tokens)]

    def decode(self, tokens, past_len):
        raise AssertionError("not needed")

    def clear(self):
        pass

    def close(self):
        pass


TEXT = np.array([[0, 1, 2, 1], [2, 2, 0, 1]], np.int64)


def test_figures_are_those_of_the_definitions(tmp_path):
    theirs, ours = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]), np.zeros((3, 3))
    ours[:, 1] = 1.0
    with Reference(tmp_path / "reference", Table(theirs), TEXT) as reference:
        found = reference.compare(Table(ours))
    even = np.exp(ours) / np.exp(ours).sum(axis=1, keepdims=True)
    read, wanted = TEXT[:, :-1].ravel(), TEXT[:, 1:].ravel()
    divergence = (np.exp(theirs) * (theirs - np.log(even))).sum(axis=1)[read]
    assert found.tokens == 6
    assert found.perplexity == pytest.approx(np.exp(-np.log(even)[read, wanted].mean()))
    assert found.kl_mean == pytest.approx(divergence.mean(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(np.quantile(divergence, 0.99), rel=1e-5)
    assert found.top1 == 0.0
    assert not (tmp_path / "reference").exists()


def test_a_model_does_not_diverge_from_itself_even_if_its_logits_are_shifted(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    with Reference(tmp_path / "reference", Table(rows), TEXT) as reference:
        found = reference.compare(Table(rows + 5.0))
    assert found.kl_mean == pytest.approx(0.0, abs=1e-6)
    assert found.top1 == 1.0


def entry(name, megabytes, divergence):
    figures = Figures(100, 13.0, divergence, 0.001, 0.5, 0.9)
    return Entry(name, int(megabytes * 1e6), int(megabytes * 5e5), 4.5, figures, 3.0, int(1e9))


def test_ours_meets_the_best_peer_that_is_no_larger():
    peers = [
        entry("llama.cpp Q4_0", 90, 0.09),
        entry("llama.cpp Q4_1", 95, 0.07),
        entry("llama.cpp Q8_0", 170, 0.001),
    ]
    rows = contests(
        "quality", "tilted", [*peers, entry("edgellm int4", 96, 0.035), entry("edgellm tiny", 80, 0.2)]
    )
    assert [row.figure for row in rows] == [pytest.approx(0.5), pytest.approx(0.2 / 0.09)]
    assert "Q4_1" in rows[0].peer
    assert rows[0].verdict == "floor met"
    assert "missed" in rows[1].verdict


def test_the_table_has_a_line_for_each_and_no_bytes_where_nothing_can_be_shipped():
    text = to_markdown("tilted", [entry("llama.cpp Q4_0", 90, 0.09), entry("ModelOpt int4-awq", 0, 0.05)])
    lines = text.splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert "| 90.0 | 45.0 | 4.50 | 13.000 | 0.0900 ± 0.0010 | 0.500 | 90.0 % | 3 | 1.00 |" in lines[4]
    assert lines[5].startswith("| ModelOpt int4-awq |  | 0.0 |")


def test_a_large_model_is_the_same_each_time_and_can_be_opened(tmp_path):
    shape = open_checkpoint(make_tiny_hf(tmp_path / "tiny", vocab=300, tied=False)).architecture
    total = write_random_model(shape, tmp_path / "first")
    write_random_model(shape, tmp_path / "again")
    assert total == 2 * sum(math.prod(dims) for dims in tensor_shapes(shape).values())
    shards = sorted(path.name for path in (tmp_path / "first").glob("*.safetensors"))
    assert len(shards) == shape.layers + 1
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in shards)
    checkpoint = open_checkpoint(tmp_path / "first")
    weights = [checkpoint.tensor(layer_tensor(layer, GATE)) for layer in range(2)]
    assert weights[0].std() == pytest.approx(0.02, rel=0.05)
    assert abs(np.corrcoef(weights[0].ravel(), weights[1].ravel())[0, 1]) < 0.05


def test_the_large_shape_has_seven_billion_weights():
    count = sum(math.prod(dims) for dims in tensor_shapes(seven_billion()).values())
    assert count == pytest.approx(6.74e9, rel=0.01)


HOLD = "import subprocess, sys, time; data = b'x' * {size}; {then}"


def test_the_peak_of_a_command_is_that_of_all_its_processes_at_one_time(tmp_path):
    child = HOLD.format(size=60_000_000, then="time.sleep(0.5); print('done')")
    parent = HOLD.format(
        size=90_000_000, then=f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    peak = peak_memory([sys.executable, "-c", parent], timeout_s=60, folder=tmp_path)
    assert peak.status == 0
    assert peak.stdout == "done\n"
    assert 150e6 < peak.unevictable_bytes < 220e6
    assert peak.resident_bytes > peak.unevictable_bytes
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_says_why(tmp_path):
    peak = peak_memory(
        [sys.executable, "-c", "raise SystemExit('no weights')"], timeout_s=60, folder=tmp_path
    )
    with pytest.raises(RuntimeError, match="quantizer failed with 1: no weights"):
        peak.check("quantizer")


@pytest.mark.parametrize("name", NAMES)
def test_each_of_our_ways_is_something_that_can_be_asked_for(name):
    asked = request(name)
    assert name.startswith(asked.quant.value)
    assert (asked.group_size is None) == ("/" not in name)


def test_entries_are_data_that_json_can_hold():
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(entry("a", 1, 0.1))))["figures"]["kl_mean"] == 0.1
