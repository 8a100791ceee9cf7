"""`edgellm plan` says what fits before anything is built, in one table or in JSON with the same words."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from google.rpc import code_pb2, error_details_pb2
from typer.testing import CliRunner

from edgellm.bundle import BundleWriter
from edgellm.cli.main import app
from edgellm.fits import Fit, known_boards
from edgellm.memory import MemoryPlan
from edgellm.profiles import load_profile, profile_names
from tests.support.fake_device import FakeDeviceService, refuse
from tests.support.tiny_bundle import make_config, make_files
from tests.support.tiny_models import make_tiny_gguf

pytestmark = pytest.mark.usefixtures("home")

CONFIGS = Path("tests/data/configs")
PAGE = Path("docs/fits.md")
LLAMA, MISTRAL = CONFIGS / "llama-3.2-1b", CONFIGS / "mistral-7b"
PRECISIONS = ["int4", "int4 KV int8", "int4-gptq", "int4-gptq KV int8", "int8", "int8 KV int8"]


def run(*args: object):
    return CliRunner().invoke(app, ["plan", *(str(arg) for arg in args)])


def good_json(*args: object):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(*args: object) -> dict:
    """The error of a command as JSON; the plain command must say the same in two lines."""
    result, plain = run(*args, "--json"), run(*args)
    assert result.exit_code == plain.exit_code == 1
    error = json.loads(result.stderr)["error"]
    assert plain.stderr == f"error: {error['message']}\n  try: {error['hint']}\n"
    return error


def table(*args: object) -> list[list[str]]:
    """Lines of the table, cut where its header begins new columns; up to the first empty line."""
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    begin = next(number for number, line in enumerate(lines) if "int4-gptq" in line)
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    header = lines[begin]
    starts = [0, *(at for at in range(2, len(header)) if header[at - 2 : at] == "  " and header[at] != " ")]
    return [
        [line[start:stop].strip() for start, stop in zip(starts, [*starts[1:], None], strict=True)]
        for line in lines[begin:end]
    ]


def test_a_model_is_planned_for_every_board_and_precision():
    header, *rows = table(MISTRAL, "--context", 4096, "--concurrency", 2)
    assert header == ["BOARD", "AVAILABLE", *PRECISIONS]
    assert {row[0] for row in rows} == set(profile_names()) - {"host"}
    assert [row[0] for row in rows] == [board.name for board in known_boards()]
    by_board = {row[0]: row[1:] for row in rows}
    assert by_board["orin-nano-8gb"][1] == "needs 8.50 GB"
    assert by_board["orin-nx-16gb"][1:3] == ["11784", "32768"]
    assert set(by_board["thor-t5000"][1:]) == {"32768"}


def test_the_legend_says_what_the_cells_mean():
    asked = run(MISTRAL, "--context", 4096, "--concurrency", 2).stdout
    assert "the longest context, tokens, for 2 sequences at once" in asked
    assert "what 2 sequences of 4096 tokens would take" in asked
    assert "what 1 sequence of 256 tokens would take, the least" in run(MISTRAL).stdout


def test_json_has_every_cell_of_the_table():
    header, *rows = table(LLAMA, "--context", 2048, "--concurrency", 3)
    shown = good_json(LLAMA, "--context", 2048, "--concurrency", 3)
    assert shown["model"] == str(LLAMA)
    assert len(shown["fits"]) == len(rows) * (len(header) - 2)
    cells = {(each["board"], _label(each)): each for each in shown["fits"]}
    for row in rows:
        for label, cell in zip(header[2:], row[2:], strict=True):
            each = cells[row[0], label]
            assert (cell == str(each["largest_context_tokens"])) == each["fits"]
            assert each["fits"] == (each["largest_context_tokens"] >= 2048)
            assert each["fits"] == (each["needed_bytes"] <= each["available_bytes"])


def _label(each: dict) -> str:
    return each["quantization"] + ("" if each["kv"] == "float32" else f" KV {each['kv']}")


def test_json_uses_the_words_of_a_memory_plan():
    words = {field.name for field in fields(Fit)}
    assert {field.name for field in fields(MemoryPlan)} <= words
    assert set(good_json(LLAMA)["fits"][0]) == words


def test_one_board_is_divided_for_each_precision():
    profile = load_profile("orin-nano-8gb")
    asked = (LLAMA, "--profile", profile.name, "--context", 8192, "--concurrency", 4)
    header, *rows = table(*asked)
    assert header[1:] == PRECISIONS
    shown = {row[0]: row[1:] for row in rows}
    assert shown["context"] == ["8192 tokens"] * 6
    assert shown["KV cache"][:2] == ["2.15 GB", "536.9 MB"]
    assert all(cell.endswith(" left") for cell in shown["fits"])
    assert "a bound, not a promise" in run(*asked).stdout
    for each in good_json(*asked)["fits"]:
        parts = ("weights_bytes", "workspace_bytes", "headroom_bytes", "kv_bytes")
        assert sum(each[part] for part in parts) == each["needed_bytes"] <= profile.usable_bytes
        assert each["headroom_bytes"] == profile.headroom_bytes
        assert each["kv_bytes"] == 4 * 8192 * each["kv_bytes_per_token"]
        bound = profile.bandwidth_super_gb_per_s * 1e9 / each["weights_bytes"]
        assert each["decode_bound_tokens_per_s"] == pytest.approx(bound, abs=0.1)


def test_without_a_context_one_board_is_divided_at_the_longest():
    for each in good_json(LLAMA, "--profile", "orin-nano-8gb")["fits"]:
        assert each["context_tokens"] == each["largest_context_tokens"] > 8192


def test_a_division_that_is_short_says_by_how_much():
    result = run(MISTRAL, "--profile", "orin-nx-16gb", "--context", 16384, "--concurrency", 2)
    assert result.exit_code == 0
    assert "no: 2.49 GB short" in result.stdout


def test_this_machine_is_planned_by_what_it_has(monkeypatch):
    monkeypatch.setattr("edgellm.fits.mem_available_bytes", lambda: 3_000_000_000)
    (first, *_) = good_json(LLAMA, "--profile", "host")["fits"]
    assert first["available_bytes"] == 3_000_000_000
    assert first["decode_bound_tokens_per_s"] is None
    assert "decode" not in run(LLAMA, "--profile", "host").stdout


def test_several_boards_may_be_named():
    _, *rows = table(LLAMA, "--profile", "thor-t5000", "--profile", "orin-nano-8gb")
    assert [row[0] for row in rows] == ["thor-t5000", "orin-nano-8gb"]


def test_a_gguf_file_and_a_config_are_models_too(tmp_path):
    source = make_tiny_gguf(tmp_path / "tiny.gguf")
    assert good_json(source, "--profile", "orin-nano-4gb")["fits"][0]["engine"] == "tiny-int4"
    named = good_json(LLAMA / "config.json")["fits"][0]["engine"]
    assert named == "llama-3.2-1b-int4" == good_json(LLAMA)["fits"][0]["engine"]


@pytest.fixture
def known(home, target):
    CliRunner().invoke(app, ["device", "add", "jetson-01", target])


@pytest.mark.usefixtures("known")
def test_a_model_is_planned_by_what_a_device_has(device):
    device.available_bytes = 4_000_000_000
    for each in good_json(LLAMA, "--device", "jetson-01")["fits"]:
        # The headroom is the device's own, not that of its kind of board.
        assert (each["available_bytes"], each["headroom_bytes"]) == (4_000_000_000, 1 << 20)
        assert each["board"] == "jetson-01"
    _, *rows = table(LLAMA, "--device", "jetson-01", "--profile", "orin-nano-8gb")
    assert [row[0] for row in rows] == ["orin-nano-8gb", "jetson-01"]


@pytest.fixture
def scarce(monkeypatch):
    """Devices refuse a plan as agents do: with the figures."""

    def refused(service, request, context):
        figures = {"needed_bytes": "1075249152", "available_bytes": str(service.device.available_bytes)}
        details = error_details_pb2.ErrorInfo(metadata=figures)
        refuse(context, code_pb2.RESOURCE_EXHAUSTED, "it does not fit", details)

    monkeypatch.setattr(FakeDeviceService, "GetMemoryPlan", refused)


@pytest.mark.usefixtures("scarce", "known")
def test_a_device_that_has_too_little_still_says_how_much(device):
    device.available_bytes = 700_000_000
    result = run(LLAMA, "--device", "jetson-01", "--json")
    assert result.exit_code == 1
    assert {each["available_bytes"] for each in json.loads(result.stdout)["fits"]} == {700_000_000}
    assert json.loads(result.stderr)["error"]["kind"] == "DoesNotFitError"


@pytest.mark.usefixtures("known")
def test_a_bundle_is_planned_for_several_boards_and_devices(tmp_path, device):
    device.available_bytes = 100 << 20
    with BundleWriter(tmp_path / "two") as writer:
        for profile in ("orin-nano-8gb", "thor-t5000"):
            writer.add(make_files(tmp_path / profile), make_config(profile, name=f"tiny-{profile}"))
    asked = (tmp_path / "two", "--profile", "thor-t5000", "--device", "jetson-01", "--concurrency", 2)
    on_thor, on_device = good_json(*asked)["fits"]
    assert (on_thor["engine"], on_thor["largest_context_tokens"]) == ("tiny-thor-t5000", 2048)
    assert (on_device["engine"], on_device["available_bytes"]) == ("tiny-orin-nano-8gb", 100 << 20)
    text = run(*asked).stdout
    assert "LONGEST CONTEXT" in text
    assert "tiny-thor-t5000" in text


def test_nothing_that_fits_is_a_failure_behind_the_figures():
    result = run(MISTRAL, "--profile", "orin-nano-4gb")
    assert (result.exit_code, result.stdout.count("short")) == (1, 6)
    error = failure(MISTRAL, "--profile", "orin-nano-4gb")
    assert error["kind"] == "DoesNotFitError"
    assert error["available_bytes"] == 1_200_000_000 < error["needed_bytes"]
    assert "mistral-7b-int4-gptq-kv-int8 comes nearest" in error["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: missing"),
        ("[]", "should hold a JSON object"),
        ("not json", "config.json: not JSON"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        ('{"model_type": "llama", "hidden_act": "silu"}', "should be a positive integer"),
    ],
)
def test_a_model_that_cannot_be_read_is_one_clear_error(tmp_path, content, message):
    source = tmp_path / "model"
    source.mkdir()
    if content is not None:
        (source / "config.json").write_text(content)
    assert message in failure(source)["message"]


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    error = failure(tmp_path / "nowhere")
    assert "nowhere: no such file or directory" in error["message"]
    assert error["hint"].startswith("give a bundle")


@pytest.mark.parametrize("lost", ["oci-layout", "index.json"])
def test_a_damaged_bundle_is_not_taken_for_a_model(bundle, lost):
    (bundle.path / lost).unlink()
    error = failure(bundle.path)
    assert error["kind"] == "BundleError"
    assert lost in error["message"]


def test_a_context_beyond_the_model_s_is_refused():
    error = failure(CONFIGS / "smollm2-135m", "--context", 9000)
    assert "--context 9000 is longer than the 8192 tokens" in error["message"]


def test_an_unknown_profile_lists_the_known_ones():
    assert "orin-nano-8gb" in failure(LLAMA, "--profile", "nano-9000")["hint"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("--context", -1), "--context"),
        (("--concurrency", 0), "--concurrency"),
        (("--device", "orin-nano-8gb"), "--profile"),
    ],
)
def test_wrong_usage_exits_with_2(wrong, named):
    result = run(LLAMA, *wrong)
    assert result.exit_code == 2
    assert named in result.stderr


def test_without_the_build_host_a_model_names_the_extra_and_a_bundle_needs_none(monkeypatch, bundle):
    monkeypatch.setattr("edgellm.estimators.metadata.entry_points", lambda **_: [])
    error = failure(LLAMA)
    assert "is no bundle" in error["message"]
    assert error["hint"] == "pip install 'edgellm[buildhost]'"
    assert good_json(bundle.path)["context_tokens"] == 2048


def test_a_build_host_that_cannot_be_imported_names_the_cause(monkeypatch):
    entry = metadata.EntryPoint("checkpoint", "edgellm_nothing.estimate:estimates", "edgellm.estimators")
    monkeypatch.setattr("edgellm.estimators.metadata.entry_points", lambda **_: [entry])
    error = failure(LLAMA)
    assert "edgellm_nothing" in error["message"]
    assert "buildhost" in error["hint"]


def test_the_docs_show_what_the_command_prints():
    examples = re.findall(r"^```console\n\$ edgellm plan (.+)\n([^`]+)^```", PAGE.read_text(), re.MULTILINE)
    assert len(examples) == 3
    for arguments, shown in examples:
        assert run(*arguments.split()).stdout == shown
