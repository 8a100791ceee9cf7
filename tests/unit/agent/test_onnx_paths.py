"""A graph leads to files of its own folder, within their bounds, and holds nothing that is not needed."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgellm_agent.runtimes import onnx_paths
from edgellm_agent.runtimes.base import EngineLoadError
from edgellm_agent.runtimes.onnx_paths import check_graph
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import KvName, QuantName
from tests.support.tiny_families import CONFIGS, write_family
from tests.support.tiny_models import make_tiny_hf

WEIGHTS = "weights-00000.bin"
SIZE = 4096


def external(**entries: object) -> TensorProto:
    tensor = TensorProto(name="w", dims=[16], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(*tensors: TensorProto, nodes: tuple[onnx.NodeProto, ...] = (), **fields: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or (helper.make_node("Add", ["x", "w"], ["y"]),),
        "decoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16])],
        list(tensors),
    )
    return helper.make_model(graph, **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(bytes(SIZE))
    (tmp_path / "secret").write_bytes(bytes(SIZE))
    return folder


def check(folder: Path, made: onnx.ModelProto | bytes) -> None:
    (folder / "model.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    check_graph(folder / "model.onnx")


def refusal(folder: Path, made: onnx.ModelProto | bytes) -> str:
    with pytest.raises(EngineLoadError, match=r"model\.onnx") as refused:
        check(folder, made)
    return str(refused.value)


def check_engine(source: Path, files: Path, quant: QuantName, kv: KvName) -> None:
    files.mkdir()
    config = build_engine(
        open_checkpoint(source), quant, files, profile="orin-nano-8gb", name="tiny", kv=kv, canary=False
    )
    for title in {config.files.graph, config.files.graph_ragged} - {None}:
        check_graph(files / str(title))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kv", KvName)
def test_every_graph_of_the_build_host_is_taken(tmp_path, family, kv):
    check_engine(write_family(tmp_path / "source", family), tmp_path / "files", QuantName.INT4, kv)


@pytest.mark.parametrize("kv", KvName)
def test_graphs_with_products_of_integers_are_taken(tmp_path, kv):
    source = make_tiny_hf(tmp_path / "hf", tied=kv is KvName.FLOAT32)
    check_engine(source, tmp_path / "files", QuantName.INT8_SMOOTHQUANT, kv)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (SIZE, 0), (SIZE - 64, 64), (1000, 64)]
)  # fmt: skip
def test_data_within_a_file_of_the_engine_is_taken(folder, offset, length):
    check(folder, model(external(location=WEIGHTS, offset=offset, length=length)))


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd", "../secret", "./" + WEIGHTS, "sub/" + WEIGHTS, "..", ".", "", "link", "pipe",
        "absent.bin", "*/_ORT_MEM_ADDR_/*", WEIGHTS + "\0", "\\\\host\\share", "weights\n",
    ],
)  # fmt: skip
def test_data_anywhere_else_is_refused(folder, location):
    (folder / "link").symlink_to(folder.parent / "secret")
    os.mkfifo(folder / "pipe")
    assert "tensor lies in" in refusal(folder, model(external(location=location))) or location in {
        "link",
        "pipe",
        "absent.bin",
    }


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (0, SIZE + 1), (2**62, 64), (2**70, 64), (-1, 64), (0, -1), ("0x10", 1), ("", 1), (1, "٣")],
)  # fmt: skip
def test_data_beyond_the_file_is_refused(folder, offset, length):
    refusal(folder, model(external(location=WEIGHTS, offset=offset, length=length)))


def test_external_data_of_two_minds_is_refused(folder):
    twice = external(location=WEIGHTS)
    twice.external_data.add(key="location", value="/etc/passwd")
    assert "twice" in refusal(folder, model(twice))
    hidden = external(location="/etc/passwd")
    hidden.data_location = TensorProto.DEFAULT
    assert "/etc/passwd" in refusal(folder, model(hidden))
    assert "twice" in refusal(folder, model(external(location=WEIGHTS, checksum="0")))


def other(kind: str) -> onnx.ModelProto:
    """A valid model with something that no engine of ours needs."""
    node = helper.make_node("Add", ["x", "w"], ["y"])
    made = model()
    match kind:
        case "operator":
            made = model(nodes=(helper.make_node("If", ["x"], ["y"]),))
        case "context":
            made = model(nodes=(helper.make_node("EPContext", [], ["y"], domain="com.microsoft"),))
        case "domain":
            made = model(nodes=(helper.make_node("Add", [], ["y"], domain="elsewhere"),))
        case "function":
            made.functions.append(helper.make_function("d", "F", ["x"], ["y"], [node], made.opset_import))
        case "subgraph":
            made.graph.node[0].attribute.append(helper.make_attribute("body", made.graph))
        case "subgraphs":
            made.graph.node[0].attribute.append(helper.make_attribute("bodies", [made.graph]))
        case "tensor":
            made.graph.node[0].attribute.append(
                helper.make_attribute("value", external(location="/etc/passwd"))
            )
        case "tensors":
            attribute = made.graph.node[0].attribute.add(name="t", type=onnx.AttributeProto.TENSORS)
            attribute.tensors.append(external(location="/etc/passwd"))
        case "sparse":
            made.graph.sparse_initializer.add().values.CopyFrom(external(location="/etc/passwd"))
        case "training":
            made.training_info.add().initialization.CopyFrom(made.graph)
        case "metadata":
            made.metadata_props.add(key="ort_config", value="{}")
    return made


@pytest.mark.parametrize(
    "kind",
    ["operator", "context", "domain", "function", "subgraph", "subgraphs", "tensor", "tensors", "sparse",
     "training", "metadata"],
)  # fmt: skip
def test_what_no_engine_needs_is_refused(folder, kind):
    assert "not allowed here" in refusal(folder, other(kind)) or kind in {"operator", "context", "domain"}


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a", b"\x3a\x05abc", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff" * 11, b"\x3b\x3c",
        b"\x38\x01", b"\x0d\x00", b"\x3a\x04\x0a\x06ab", b"\xf8\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00",
    ],
)  # fmt: skip
def test_what_is_no_protobuf_is_refused(folder, data):
    refusal(folder, data)


def test_a_graph_that_is_no_file_too_large_or_too_long_is_refused(folder, monkeypatch):
    (folder / "elsewhere.onnx").symlink_to(folder / WEIGHTS)
    with pytest.raises(EngineLoadError, match="plain file"):
        check_graph(folder / "elsewhere.onnx")
    monkeypatch.setattr(onnx_paths, "MAX_FIELDS", 1000)
    assert "1,000 fields" in refusal(folder, b"\x08\x01" * 1001)
    check(folder, b"\x08\x01" * 1000)
    monkeypatch.setattr(onnx_paths, "MAX_GRAPH_BYTES", 10)
    assert "more than 10" in refusal(folder, bytes(11))


def locations(message: object, found: set[str]) -> set[str]:
    """Every external location that protobuf's own parser finds, anywhere in a message."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in [value] if not hasattr(value, "__len__") or hasattr(value, "ListFields") else value:
            if isinstance(item, onnx.TensorProto):
                found |= {entry.value for entry in item.external_data if entry.key == "location"}
            locations(item, found)
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from("sdi")), max_size=4))
@example(edits=[])
def test_whatever_is_changed_in_a_graph_only_the_engine_s_files_are_reached(folder, edits):
    data = bytearray(
        model(
            external(location=WEIGHTS, offset=64, length=64), external(location=WEIGHTS)
        ).SerializeToString()
    )
    for where, byte, how in edits:
        at = int(where * (len(data) - 1))
        if how == "s":
            data[at] = byte
        elif how == "d":
            del data[at]
        else:
            data.insert(at, byte)
    try:
        check(folder, bytes(data))
    except EngineLoadError:
        return
    try:
        parsed = onnx.ModelProto.FromString(bytes(data))
    except DecodeError:
        return
    # What passes, and protobuf reads, leads nowhere else and computes nothing else.
    assert locations(parsed, set()) <= {WEIGHTS}
    assert {(node.domain, node.op_type) for node in parsed.graph.node} <= onnx_paths.OPERATORS
