"""What a build says about itself is attached to the engine and does not change its digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from edgellm.bundle import Bundle
from edgellm.signing import Envelope, Statement, times
from edgellm.signing.statements import PROVENANCE_TYPE
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.provenance import MAX_SOURCES, Sources
from tests.support.tiny_models import make_tiny_hf
from tests.unit.buildhost.test_build import run_build


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    return make_tiny_hf(tmp_path / "tiny")


def test_a_build_says_what_it_was_made_from_and_with(tmp_path: Path, hf: Path) -> None:
    code, output = run_build(str(hf), "-o", str(tmp_path / "b"), "--precision", "int8", "--json")
    assert code == 0, output
    digest = json.loads(output)["digest"]
    (attestation,) = Bundle.open(tmp_path / "b").attestations(digest)
    envelope = Envelope.parse(attestation)
    statement = Statement.parse(envelope.payload)
    assert envelope.signatures == ()
    assert (statement.predicate_type, statement.digest) == (PROVENANCE_TYPE, digest)
    definition, details = (statement.predicate[part] for part in ("buildDefinition", "runDetails"))
    assert isinstance(definition, dict)
    assert isinstance(details, dict)
    found = {item["name"]: item["digest"]["sha256"] for item in definition["resolvedDependencies"]}
    read = {"config.json", "model.safetensors", "tokenizer.json"}
    assert read <= set(found)
    assert all(found[name] == hashlib.sha256((hf / name).read_bytes()).hexdigest() for name in found)
    assert definition["externalParameters"] == {
        "source": "tiny",
        "quant": "int8",
        "kv": "float32",
        "profile": "host",
        "name": "tiny-int8",
    }
    assert {"python", "numpy", "onnx-ir"} <= set(details["builder"]["version"])
    began, ended = (times.from_text(details["metadata"][name]) for name in ("startedOn", "finishedOn"))
    assert began <= ended


def test_files_that_are_no_source_are_not_read(tmp_path: Path, hf: Path) -> None:
    (hf / "README.md").write_text("hello")
    (hf / "pytorch_model.bin").write_bytes(b"x")
    assert not {"README.md", "pytorch_model.bin"} & set(Sources.read(hf).files)


def test_a_source_of_too_many_files_is_refused(tmp_path: Path) -> None:
    for number in range(MAX_SOURCES + 1):
        (tmp_path / f"{number}.json").write_text("{}")
    with pytest.raises(BuildError, match="257 files"):
        Sources.read(tmp_path)


def test_as_many_sources_as_are_taken_fit_into_an_envelope(tmp_path: Path) -> None:
    from edgellm_buildhost import provenance

    files = {
        f"model-{number:05d}-of-00256.safetensors": "sha256:" + "ab" * 32 for number in range(MAX_SOURCES)
    }
    options = dict.fromkeys(("precision", "kv", "profile", "name"), "x" * 128)
    data = provenance.envelope("x" * 128, "sha256:" + "ab" * 32, Sources("x" * 128, files), options, 0.0)
    assert len(data) < 60_000
