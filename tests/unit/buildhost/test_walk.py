"""A text's way through a model: it goes on where it was, in the memory of one layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgellm_buildhost.calibration.walk import FloatModel, TextWalk
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.layer import Point
from tests.support.builds import ROOT
from tests.support.small_disk import run_on, small_disk
from tests.support.tiny_families import CONFIGS, POSITIONS, TOKENS, write_family
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.test_transformers import assert_close, recorded

LAYERS = 4
WINDOWS = np.random.default_rng(3).integers(3, 288, (3, 40))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_hf(tmp_path_factory.mktemp("model") / "tiny", layers=LAYERS)


@pytest.fixture
def model(source: Path) -> FloatModel:
    return FloatModel(open_checkpoint(source))


def walked(model: FloatModel, folder: Path, layers: range) -> list[dict[Point, np.ndarray]]:
    """What the walk sees at the linears of these layers, saving behind each."""
    walk, seen = TextWalk(model, WINDOWS, folder), []
    walk.go_to(layers.start)
    for layer in layers:
        statistics = walk.observe(layer, model.layer(layer), advance=True)
        seen.append({point: statistics[point].gram for point in Point})
        walk.save(layer + 1)
    return seen


@pytest.mark.parametrize("done", range(1, LAYERS))
def test_a_walk_that_goes_on_sees_what_one_without_a_stop_sees(
    done: int, model: FloatModel, source: Path, tmp_path: Path
) -> None:
    whole = walked(model, tmp_path / "whole", range(LAYERS))
    walked(model, tmp_path / "cut", range(done))
    rest = walked(FloatModel(open_checkpoint(source)), tmp_path / "cut", range(done, LAYERS))
    for expected, found in zip(whole[done:], rest, strict=True):
        for point in Point:
            np.testing.assert_array_equal(found[point], expected[point])
    ends = [(tmp_path / name / f"hidden-{LAYERS:05d}.npy").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from edgellm_buildhost.calibration.walk import FloatModel, TextWalk
from edgellm_buildhost.checkpoint import open_checkpoint
from tests.unit.buildhost.test_walk import WINDOWS
model = FloatModel(open_checkpoint(Path(sys.argv[1])))
walk = TextWalk(model, WINDOWS, Path(sys.argv[2]))
walk.go_to(0)
for layer in range(3):
    walk.observe(layer, model.layer(layer), advance=True)
    if layer == 2:
        save = np.save
        def half(file, array):
            save(file, array[:1])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        np.save = half
    walk.save(layer + 1)
"""


def test_a_walk_killed_while_it_saves_goes_on_from_the_layer_before(
    model: FloatModel, source: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", _KILLED, str(source), str(tmp_path / "cut")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    assert not (tmp_path / "cut" / "hidden-00003.npy").exists()
    rest = walked(model, tmp_path / "cut", range(2, LAYERS))
    whole = walked(model, tmp_path / "whole", range(LAYERS))
    np.testing.assert_array_equal(rest[-1][Point.FFN], whole[-1][Point.FFN])


def test_only_the_states_of_two_layers_are_on_the_disk_and_nothing_half(
    model: FloatModel, tmp_path: Path
) -> None:
    walked(model, tmp_path, range(LAYERS))
    names = [f"hidden-{layer:05d}.npy" for layer in (LAYERS - 1, LAYERS)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_observing_without_going_on_changes_nothing(model: FloatModel, tmp_path: Path) -> None:
    walk = TextWalk(model, WINDOWS, tmp_path)
    walk.go_to(0)
    once, twice = (walk.observe(0, model.layer(0), advance=False) for _ in range(2))
    np.testing.assert_array_equal(once[Point.ATTENTION].gram, twice[Point.ATTENTION].gram)
    walk.advance(0, model.layer(0))
    walk.save(1)
    observed = walked(model, tmp_path / "other", range(1))
    assert (tmp_path / "hidden-00001.npy").read_bytes() == (
        tmp_path / "other" / "hidden-00001.npy"
    ).read_bytes()
    np.testing.assert_array_equal(observed[0][Point.ATTENTION], once[Point.ATTENTION].gram)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_walk_gives_the_logits_of_every_family(family: str, tmp_path: Path) -> None:
    model = FloatModel(open_checkpoint(write_family(tmp_path / family, family)))
    (hidden,) = model.final_hidden(TOKENS[None], lambda _done, _total: None)
    assert_close(model.logits(hidden)[list(POSITIONS)], recorded(family))


def test_values_that_overflow_are_told_with_their_layer(tmp_path: Path, source: Path) -> None:
    checkpoint = open_checkpoint(source)
    tensor, loud = checkpoint.tensor, "model.layers.2.mlp.down_proj.weight"
    checkpoint.tensor = lambda name: tensor(name) * np.float32(3e38 if name == loud else 1)  # type: ignore[method-assign]
    with pytest.raises(BuildError, match="layer 2 computes values that are not finite"):
        walked(FloatModel(checkpoint), tmp_path, range(LAYERS))


_ON_A_FULL_DISK = """
import sys
from pathlib import Path
from edgellm_buildhost.calibration.walk import FloatModel, TextWalk
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.errors import BuildError
from tests.unit.buildhost.test_walk import WINDOWS, walked
folder = Path(sys.argv[2])
model = FloatModel(open_checkpoint(Path(sys.argv[1])))
try:
    walked(model, folder, range(3))
except BuildError as error:
    print(error.message, "|", error.hint)
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_is_named_with_figures_and_the_layer_before_stays(tmp_path: Path, source: Path) -> None:
    states = WINDOWS.size * 64 * 4
    disk = small_disk(tmp_path / "disk", str(states + 16 * 1024))
    error, left = run_on(disk, _ON_A_FULL_DISK, source, tmp_path / "disk" / "walk").splitlines()
    assert f"{tmp_path / 'disk' / 'walk'}: cannot save {states:,} bytes" in error
    assert "bytes free" in error
    assert "free some space" in error
    assert left == "['hidden-00001.npy']"


_MEMORY = """
import re, sys
from pathlib import Path
from edgellm_buildhost.calibration.walk import FloatModel, TextWalk
from edgellm_buildhost.checkpoint import open_checkpoint
from tests.unit.buildhost.test_walk import WINDOWS
model = FloatModel(open_checkpoint(Path(sys.argv[1])))
walk = TextWalk(model, WINDOWS, Path(sys.argv[2]))
walk.go_to(0)
for layer in range(model.architecture.layers):
    floats = model.layer(layer)
    walk.observe(layer, floats, advance=True)
    print(int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
    del floats
"""


def test_the_walk_takes_the_memory_of_a_layer_and_not_of_those_before(tmp_path: Path) -> None:
    source = make_tiny_hf(
        tmp_path / "model", layers=8, hidden=512, heads=8, kv_heads=8, head_dim=64, ffn=2048
    )
    layer_bytes = 4 * (3 * 512 * 2048 + 4 * 512 * 512)
    command = [sys.executable, "-c", _MEMORY, str(source), str(tmp_path / "walk")]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    _, second, *others = map(int, told.splitlines())  # the first makes the session
    assert max(others) < second + 1.5 * layer_bytes
