"""The command line says one line of what is wrong and one of what to do, and speaks JSON when asked to."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from importlib import metadata

import pytest
import typer
from typer.testing import CliRunner

from edgellm import paths
from edgellm.cli.main import app
from edgellm.cli.output import human_bytes, printable
from edgellm.errors import EdgellmError
from tests.support.tiny_bundle import make_config

pytestmark = pytest.mark.usefixtures("home")


def run(*args: object, **options: object):
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def good_json(*args: object, **options: object):
    result = run(*args, "--json", **options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(*args: object, **options: object) -> dict:
    """The error of a command as JSON; the plain command must say the same in two lines."""
    result, plain = run(*args, "--json", **options), run(*args, **options)
    assert (result.exit_code, result.stdout) == (plain.exit_code, plain.stdout) == (1, "")
    error = json.loads(result.stderr)["error"]
    assert plain.stderr == f"error: {error['message']}\n  try: {error['hint']}\n"
    return error


@pytest.fixture
def known(home, target):
    run("device", "add", "jetson-01", target)


def test_version_is_the_distribution_s():
    assert good_json("version")["edgellm"] == metadata.version("edgellm")


def test_inspect_shows_precision_sizes_and_digests(bundle):
    text = run("inspect", bundle.path).stdout
    (variant,) = bundle.variants
    for fact in ("tiny-int4", "int4, groups of 32, asymmetric", "int8", variant.digest, "3.1 MB"):
        assert fact in text
    assert all(layer.title in text and layer.digest in text for layer in variant.manifest.layers)
    shown = good_json("inspect", bundle.path)
    assert shown["verified"]
    assert shown["engines"][0]["digest"] == variant.digest
    assert shown["engines"][0]["config"] == json.loads(variant.config.to_json())


def test_inspect_takes_the_last_build(bundle):
    paths.record_last_build(bundle.path)
    assert good_json("inspect")["bundle"] == str(bundle.path)


def test_inspect_refuses_a_changed_byte(bundle):
    layer = bundle.variants[0].manifest.layers[0]
    path = bundle.blob_path(layer.digest)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    error = failure("inspect", bundle.path)
    assert error["kind"] == "BundleError"
    assert layer.title in error["message"]
    assert layer.digest in error["message"]


def test_a_bundle_that_is_not_there_is_an_error(tmp_path):
    assert "no bundle at" in failure("inspect", tmp_path / "nowhere")["message"]
    assert "edgellm build" in failure("push", "engine", "--device", "x")["hint"]


def test_plan_is_for_the_bundle_s_own_profile_or_another(bundle):
    own = good_json("plan", bundle.path, "--context", 1000, "--concurrency", 4)
    assert (own["available_bytes"], own["context_tokens"], own["max_sequences"]) == (5_200_000_000, 1000, 4)
    assert good_json("plan", bundle.path, "--profile", "thor-t5000")["available_bytes"] == 125_200_000_000
    assert good_json("plan", bundle.path, "--profile", "host")["available_bytes"] > 0
    assert "1000 tokens" in run("plan", bundle.path, "--context", 1000).stdout


def test_plan_refuses_what_does_not_fit_with_figures(tmp_path, files):
    from edgellm.bundle import BundleWriter

    config = make_config("orin-nano-4gb")
    footprint = config.footprint.model_copy(update={"weights_bytes": 4_000_000_000})
    with BundleWriter(tmp_path / "big") as writer:
        writer.add(files, config.model_copy(update={"footprint": footprint}))
    error = failure("plan", tmp_path / "big")
    assert error["kind"] == "DoesNotFitError"
    assert error["available_bytes"] == 1_200_000_000 < error["needed_bytes"]


def test_plan_of_an_unknown_profile_lists_the_known_ones(bundle):
    assert "orin-nano-8gb" in failure("plan", bundle.path, "--profile", "nano-9000")["hint"]


@pytest.mark.usefixtures("known")
def test_plan_asks_the_device(bundle, device):
    device.available_bytes = 100 << 20
    asked = good_json("plan", bundle.path, "--device", "jetson-01")
    assert asked["available_bytes"] == 100 << 20
    assert good_json("plan", bundle.path, "--device", "jetson-01", "--context", 300)["context_tokens"] == 300


def test_devices_are_added_listed_and_removed():
    assert "device add" in run("device", "list").stdout
    run("device", "add", "jetson-01", "192.0.2.7:7400")
    (listed,) = good_json("device", "list")["devices"]
    assert listed == {"name": "jetson-01", "target": "192.0.2.7:7400", "groups": [], "tls": None}
    assert run("device", "list").stdout.splitlines() == [
        "NAME       OVER  ADDRESS         GROUPS",
        "jetson-01  tls   192.0.2.7:7400",
    ]
    run("device", "remove", "jetson-01")
    assert good_json("device", "list") == {"devices": []}


def test_a_device_is_added_with_groups_and_with_files_that_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--group", "street", "--group", "canary", "--ca", "ca.pem", "--server-name", "board")
    added = good_json("device", "add", "jetson-01", "192.0.2.7:7400", *options)
    assert added["groups"] == ["canary", "street"]
    assert (added["tls"]["ca_file"], added["tls"]["server_name"]) == (str(tmp_path / "ca.pem"), "board")
    assert "canary, street" in run("device", "list").stdout
    error = failure("device", "add", "jetson-01", "ssh://board", "--cert", "a.pem", "--key", "a.key")
    assert "takes no certificate" in error["message"]


def test_an_unknown_device_says_how_to_add_it(bundle):
    run("device", "add", "jetson-01", "192.0.2.7:7400")
    error = failure("push", "engine", bundle.path, "--device", "jetson-02")
    assert error["kind"] == "UnknownDeviceError"
    assert "jetson-01" in error["message"]
    assert "edgellm device add jetson-02" in error["hint"]


def test_an_agent_that_is_not_running_says_so(bundle, tmp_path):
    error = failure("device", "info", f"unix://{tmp_path}/nobody.sock")
    assert error["kind"] == "DeviceUnreachableError"
    assert "No such file" in error["message"]


@pytest.mark.usefixtures("known")
def test_info_shows_what_the_device_is():
    assert good_json("device", "info", "jetson-01")["runtimes"] == [
        {"name": "onnxruntime", "version": "1.32.0"}
    ]
    assert "orin-nano-8gb (simulated)" in run("device", "info", "jetson-01").stdout


@pytest.mark.usefixtures("known")
def test_push_sends_activates_and_says_what_was_sent(bundle, device):
    paths.record_last_build(bundle.path)
    (variant,) = bundle.variants
    pushed = good_json("push", "engine", "--device", "jetson-01")
    assert (pushed["digest"], pushed["activated"]) == (variant.digest, True)
    assert (pushed["sent_bytes"], pushed["skipped_bytes"]) == (variant.manifest.size_bytes, 0)
    assert device.active == variant.digest
    again = run("push", "engine", bundle.path, "--device", "jetson-01")
    assert variant.digest in again.stdout
    assert "0 B in" in again.stdout
    assert again.stderr == ""


@pytest.mark.usefixtures("known")
def test_push_without_activation_leaves_the_active_engine(bundle, device):
    assert not good_json("push", "engine", bundle.path, "--device", "jetson-01", "--no-activate")["activated"]
    assert device.active == ""


@pytest.mark.usefixtures("known")
def test_push_leaves_a_bundle_for_another_target_to_the_device_s_judgement(bundle, device):
    device.profile = "thor-t5000"
    error = failure("push", "engine", bundle.path, "--device", "jetson-01")
    assert (error["code"], error["message"]) == ("FAILED_PRECONDITION", "this engine is for orin-nano-8gb")
    assert device.uploads == []


@pytest.mark.usefixtures("known")
def test_push_picks_the_variant_for_the_device(tmp_path, device):
    from edgellm.bundle import BundleWriter
    from tests.support.tiny_bundle import make_files

    with BundleWriter(tmp_path / "b") as writer:
        writer.add(make_files(tmp_path / "1"), make_config("thor-t5000"))
        nano = writer.add(make_files(tmp_path / "2"), make_config("orin-nano-8gb"))
    assert good_json("push", "engine", tmp_path / "b", "--device", "jetson-01")["digest"] == nano
    device.profile = "agx-orin-64gb"
    assert "agx-orin-64gb" in failure("push", "engine", tmp_path / "b", "--device", "jetson-01")["message"]


@pytest.mark.usefixtures("known")
def test_engines_are_listed_activated_and_removed(bundle, device):
    digest = bundle.variants[0].digest
    run("push", "engine", bundle.path, "--device", "jetson-01", "--no-activate")
    assert good_json("engine", "activate", digest, "--device", "jetson-01")["plan"]["kv_bytes"] > 0
    assert good_json("engine", "list", "--device", "jetson-01")["engines"][0]["active"]
    assert digest in run("engine", "list", "--device", "jetson-01").stdout
    freed = good_json("engine", "remove", digest, "--device", "jetson-01")["freed_bytes"]
    assert freed == bundle.variants[0].manifest.size_bytes
    assert failure("engine", "remove", digest, "--device", "jetson-01")["code"] == "NOT_FOUND"


@pytest.mark.usefixtures("known")
def test_a_device_is_pinned_to_its_engine_and_unpinned(bundle, device):
    run("push", "engine", bundle.path, "--device", "jetson-01")
    digest = bundle.variants[0].digest
    pinned = good_json("engine", "pin", "--device", "jetson-01")
    assert (pinned["pinned"], pinned["active_engine"], device.pinned) == (True, digest, True)
    assert digest in run("engine", "pin", "--device", "jetson-01").stdout
    assert not good_json("engine", "unpin", "--device", "jetson-01")["pinned"]
    assert not device.pinned


@pytest.mark.usefixtures("known")
def test_generate_streams_text_or_json_lines(device):
    assert run("generate", "--device", "jetson-01", "--prompt", "Hi").stdout == "Hello Jetson.\n"
    lines = run("generate", "--device", "jetson-01", "--json", input="from stdin").stdout.splitlines()
    *chunks, summary = [json.loads(line) for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == "Hello Jetson."
    assert (summary["finish_reason"], summary["completion_tokens"]) == ("stop", 4)
    assert [request.prompt for request in device.requests] == ["Hi", "from stdin"]
    assert failure("generate", "--device", "jetson-01", "--prompt", "")["field"] == "prompt"


@pytest.mark.usefixtures("known")
def test_chat_answers_standard_input_once(device):
    result = run("chat", "--device", "jetson-01", "--system", "Be brief.", "--seed", 7, input="Hi\n")
    assert result.stdout == "Hello Jetson.\n"
    (request,) = device.requests
    assert [(item.role, item.content) for item in request.chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]
    assert request.sampling.seed == 7


def test_wrong_usage_exits_with_2():
    plain, as_json = run("plan", "--nope"), run("plan", "--nope", "--json")
    assert plain.exit_code == as_json.exit_code == 2
    assert "--nope" in plain.stderr
    assert json.loads(as_json.stderr)["error"]["kind"] == "UsageError"
    assert run("push", "engine").exit_code == 2


def test_an_unexpected_failure_is_two_lines_and_a_trace_only_when_asked_for(monkeypatch, bundle):
    def broken(self, on_progress=None):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("edgellm.bundle.Bundle.verify", broken)
    assert "unexpected ZeroDivisionError: oops" in failure("inspect", bundle.path)["message"]
    assert isinstance(run("--debug", "inspect", bundle.path).exception, ZeroDivisionError)


class Entry:
    """An entry point whose package may be broken."""

    def __init__(self, name, loaded):
        self.name = name
        self._loaded = loaded

    def load(self):
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_commands_of_other_packages_join_and_an_absent_one_names_its_extra(monkeypatch):
    plugin = typer.Typer()

    @plugin.command()
    def elsewhere() -> None:
        raise EdgellmError("elsewhere failed", "look")

    entries = [Entry("build", ModuleNotFoundError("No module named 'onnx'")), Entry("telemetry", plugin)]
    monkeypatch.setattr("edgellm.cli.plugins.metadata.entry_points", lambda group: entries)
    listed = run("--help").stdout
    assert "elsewhere" in listed
    assert "build" in listed
    assert run("elsewhere").stderr == "error: elsewhere failed\n  try: look\n"
    assert failure("build", "model", "--bits", "4")["hint"] == "pip install 'edgellm[buildhost]'"
    monkeypatch.setattr("edgellm.cli.plugins.metadata.entry_points", lambda group: [])
    assert "buildhost" in failure("build")["hint"]


def test_own_commands_do_not_wait_for_other_packages(monkeypatch):
    monkeypatch.setattr("edgellm.cli.plugins.load_commands", lambda: pytest.fail("loaded"))
    assert run("device", "list").exit_code == 0


def test_a_model_cannot_command_the_terminal():
    assert printable("a\x1b[2Jb\x07\n\tß") == "a[2Jb\n\tß"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (5_200_000_000, "5.20 GB")]
)
def test_sizes_are_read_at_a_glance(count, text):
    assert human_bytes(count) == text


def program(*args: str, **options):
    return subprocess.run(
        [sys.executable, "-c", "from edgellm.cli.main import main; main()", *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_the_program_exits_with_1_and_two_lines(home):
    result = program("device", "info", "jetson-09")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "error: unknown device 'jetson-09'; known: none",
        "  try: add it with `edgellm device add jetson-09 ssh://USER@HOST`",
    ]


def test_the_program_starts_without_grpc_or_pydantic(home):
    late = ("grpc", "pydantic", "rich", "cryptography")
    code = f"import sys, edgellm.cli.main; print([m for m in {late} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


@pytest.mark.usefixtures("known")
def test_chat_on_a_terminal_remembers_the_conversation(device, home):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from edgellm.cli.main import main; main()", "chat", "--device", "jetson-01"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    os.close(theirs)
    os.write(ours, b"Hi\nAnd now?\n\x04")
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        os.close(ours)
    assert process.returncode == 0
    assert output.count("Hello Jetson.") == 2
    assert [item.content for item in device.requests[1].chat.messages] == ["Hi", "Hello Jetson.", "And now?"]


def test_plan_tells_a_profile_from_a_device(bundle):
    result = run("plan", bundle.path, "--device", "orin-nano-8gb")
    assert result.exit_code == 2
    assert "--profile" in result.stderr
