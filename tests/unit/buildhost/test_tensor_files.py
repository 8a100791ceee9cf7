"""Safetensors files of a directory: what was written is read in every type, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.checkpoint.tensor_files import TYPE_NAMES, TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantized import open_quantized
from edgellm_buildhost.quantized.tensor_writer import whole, write_tensors
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.quantized_layers import symmetric, write

EMBEDDING = "model.embed_tokens.weight"
FLOAT32 = [np.dtype(np.float32)]

kinds = st.sampled_from(list(TYPE_NAMES))
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    """A few of any types and shapes, scalars and empty ones too; any bytes are a value."""
    found = {}
    for name in draw(st.sets(st.text("abc.", min_size=1, max_size=4), min_size=1, max_size=4)):
        kind, shape = draw(kinds), draw(shapes)
        size = int(np.prod(shape)) * kind.itemsize
        data = draw(st.binary(min_size=size, max_size=size))
        found[name] = np.frombuffer(data, kind).reshape(shape)
    return found


def written(directory: Path, values: dict[str, np.ndarray[Any, Any]]) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "model.safetensors"
    write_tensors(path, [whole(name, array) for name, array in values.items()])
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """One tensor `a`, float32 [2, 3]."""
    written(tmp_path / "files", {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    return tmp_path / "files"


@given(tensors())
@settings(max_examples=60, deadline=None)
def test_every_type_and_shape_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, np.ndarray[Any, Any]]
) -> None:
    directory = tmp_path_factory.mktemp("files")
    written(directory, values)
    files = TensorFiles(directory)
    assert files.shapes == {name: array.shape for name, array in values.items()}
    for name, array in values.items():
        read = files.read(name, [array.dtype], array.shape)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_gives_other_values_or_an_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("files")
    path = written(directory, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    error = error_of_reading(directory)
    assert error is None or ("model.safetensors" in error.message and error.hint)


def error_of_reading(directory: Path) -> BuildError | None:
    """All of it; any other error is none that a user should see."""
    try:
        files = TensorFiles(directory)
        for name, shape in files.shapes.items():
            files.read(name, list(TYPE_NAMES), shape)
    except BuildError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("name", "shape", "kinds", "message"),
    [
        ("b", (2, 3), FLOAT32, "no tensor b in the safetensors files"),
        ("a", (3, 2), FLOAT32, r"model\.safetensors: tensor a has shape \[2, 3\], .* says \[3, 2\]"),
        ("a", (2, 3), [np.dtype(np.int8)], r"model\.safetensors: tensor a has type F32, it should be I8"),
    ],
    ids=["missing", "shape", "type"],
)
def test_a_tensor_that_is_not_what_was_asked_for_is_named(
    directory: Path, name: str, shape: tuple[int, ...], kinds: list[np.dtype[Any]], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        TensorFiles(directory).read(name, kinds, shape)


@pytest.mark.parametrize("left", [None, 100], ids=["removed", "cut short"])
def test_a_file_that_went_since_it_was_opened_is_named(directory: Path, left: int | None) -> None:
    files, path = TensorFiles(directory), directory / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[:left])
    with pytest.raises(BuildError, match=r"model\.safetensors: cannot read tensor a"):
        files.read("a", FLOAT32, (2, 3))


def test_of_a_tensor_in_two_shards_the_one_counts_that_the_index_names(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": np.full(3, number, np.float32)}, tmp_path / f"{number}.safetensors")
    save_file({"a": np.full(3, 3, np.float32), "b": np.zeros(1, np.float32)}, tmp_path / "3.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "3.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert TensorFiles(tmp_path).floats("a", (3,)).tolist() == [1, 1, 1]


def test_an_index_of_a_quantized_checkpoint_cannot_point_outside_the_directory(tmp_path: Path) -> None:
    directory = write(tmp_path / "out", make_tiny_hf(tmp_path / "tiny"), symmetric(4))
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))
    with pytest.raises(BuildError, match="outside the directory"):
        open_quantized(directory)


def add(path: Path, **values: np.ndarray[Any, Any]) -> None:
    found = load_file(path)
    save_file(found | {name.replace("__", "."): value for name, value in values.items()}, path)


def test_what_a_float_checkpoint_needs_not_may_have_any_type(tmp_path: Path) -> None:
    directory = make_tiny_hf(tmp_path / "tiny")
    add(directory / "model.safetensors", vision__mask=np.ones(3, np.bool_))
    open_checkpoint(directory)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(np.int32, "has type I32, floating point is needed"), (np.bool_, "has type BOOL, which cannot be read")],
    ids=["integers", "unknown"],
)
def test_weights_that_are_no_floats_are_refused_before_the_work_begins(
    tmp_path: Path, kind: Any, message: str
) -> None:
    directory = make_tiny_hf(tmp_path / "tiny")
    shape = TensorFiles(directory).shapes[EMBEDDING]
    add(directory / "model.safetensors", **{EMBEDDING: np.ones(shape, kind)})
    with pytest.raises(BuildError, match=f"{EMBEDDING} {message}"):
        open_checkpoint(directory)


def test_a_quantized_checkpoint_with_a_type_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "out", make_tiny_hf(tmp_path / "tiny"), symmetric(4))
    shard = directory / "model-00001-of-00003.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    add(shard, **{name: np.ones((64, 2), np.bool_)})
    with pytest.raises(BuildError, match=f"{name} has type BOOL, which cannot be read"):
        open_quantized(directory)


def test_floats_that_were_handed_out_are_the_callers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_tiny_hf(tmp_path / "tiny"))
    rows = checkpoint.rows(EMBEDDING, 0, 4)
    before = rows.copy()
    rows += 1
    np.testing.assert_array_equal(checkpoint.rows(EMBEDDING, 0, 4), before)
