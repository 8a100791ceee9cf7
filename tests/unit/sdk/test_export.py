"""An engine leaves its bundle whole and unchanged, or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle import digest as digests
from edgellm.cli.main import app
from edgellm.errors import BundleError, DoesNotFitError, EdgellmError
from edgellm.export import ServingOptions, export_directory, export_triton
from edgellm.export import directory as directories
from edgellm.export.triton_config import config_pbtxt
from tests.support.tiny_bundle import make_config, make_files
from tests.support.triton.config import read_config

pytestmark = pytest.mark.usefixtures("home")


def run(*args: object):
    return CliRunner().invoke(app, ["export", *(str(arg) for arg in args)])


def good_json(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure(*args: object) -> dict:
    result = run(*args, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    return json.loads(result.stderr)["error"]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def several(tmp_path: Path) -> Bundle:
    """A bundle with engines for two boards."""
    with BundleWriter(tmp_path / "several.bundle") as writer:
        for profile, weights in (("orin-nano-8gb", b"small"), ("orin-nx-16gb", b"large")):
            files = make_files(tmp_path / profile, weights)
            writer.add(files, make_config(profile))
    return Bundle.open(tmp_path / "several.bundle")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


class TestDirectory:
    def test_has_the_files_of_the_engine_and_proves_which_engine_it_is(self, bundle, out):
        (variant,) = bundle.variants
        shown = good_json("dir", bundle.path, out / "engine")
        assert shown["digest"] == variant.digest
        for layer in variant.manifest.layers:
            assert digests.of_file(out / "engine" / layer.title) == layer.digest
        assert digests.of_file(out / "engine" / "engine.json") == variant.manifest.config.digest
        assert digests.of_file(out / "engine" / "manifest.json") == variant.digest
        assert everything(out / "engine") == {*shown["files"], "engine.json", "manifest.json"}

    def test_can_be_read_by_other_users_as_any_new_directory(self, bundle, out):
        plain = out / "plain"
        plain.mkdir()
        good_json("dir", bundle.path, out / "engine")
        assert stat.S_IMODE((out / "engine").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    def test_the_last_build_is_the_default(self, bundle, out):
        from edgellm import paths

        paths.record_last_build(bundle.path)
        assert good_json("dir", out / "engine")["digest"] == bundle.variants[0].digest

    def test_an_empty_directory_is_filled(self, bundle, out):
        good_json("dir", bundle.path, out)
        assert (out / "engine.json").is_file()

    @pytest.mark.parametrize("kind", ["a file", "a directory with a file", "a link", "a broken link"])
    def test_what_is_there_stays_as_it_is(self, bundle, out, kind):
        target = out / "taken"
        if kind == "a file":
            target.write_bytes(b"mine")
        elif kind == "a directory with a file":
            target.mkdir()
            (target / "mine").write_bytes(b"mine")
        else:
            target.symlink_to(out / "elsewhere")
            if kind == "a link":
                (out / "elsewhere").mkdir()
        before = everything(out)
        assert str(target) in failure("dir", bundle.path, target)["message"]
        assert everything(out) == before

    @pytest.mark.parametrize("damage", ["another byte", "a byte more", "a byte less", "a link", "nothing"])
    def test_a_changed_blob_is_named_and_nothing_is_left(self, bundle, out, damage, tmp_path):
        layer = max(bundle.variants[0].manifest.layers, key=lambda layer: layer.size_bytes)
        blob = bundle.blob_path(layer.digest)
        data = blob.read_bytes()
        blob.unlink()
        if damage == "a link":
            (tmp_path / "secret").write_bytes(data)
            blob.symlink_to(tmp_path / "secret")
        elif damage != "nothing":
            changed = {"another byte": data[:-1] + b"!", "a byte more": data + b"!", "a byte less": data[:-1]}
            blob.write_bytes(changed[damage])
        error = failure("dir", bundle.path, out / "engine")
        assert layer.digest in error["message"]
        assert everything(out) == set()

    def test_a_link_that_takes_the_blob_s_place_at_the_last_moment_is_not_followed(
        self, bundle, out, tmp_path, monkeypatch
    ):
        link = tmp_path / "link"
        (digest,) = (variant.manifest.layers[0].digest for variant in bundle.variants)
        link.symlink_to(bundle.blob_path(digest))
        monkeypatch.setattr(bundle, "blob_path", lambda digest: link)
        with pytest.raises(OSError, match="symbolic links"):
            export_directory(bundle, bundle.variants[0], out / "engine")
        assert everything(out) == set()

    def test_an_interrupt_leaves_nothing(self, bundle, out):
        def interrupted(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_directory(bundle, bundle.variants[0], out / "engine", interrupted)
        assert everything(out) == set()

    def test_a_target_that_appears_meanwhile_is_not_touched(self, bundle, out):
        def somebody_else(done: int, total: int) -> None:
            (out / "engine").mkdir(exist_ok=True)
            (out / "engine" / "mine").write_bytes(b"mine")

        with pytest.raises(OSError, match="not empty"):
            export_directory(bundle, bundle.variants[0], out / "engine", somebody_else)
        assert everything(out) == {"engine", "engine/mine"}

    def test_a_disk_without_room_is_told_before_a_byte_is_written(self, bundle, out, monkeypatch):
        usage = os.statvfs_result((4096, 4096, 1000, 10, 10, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: usage)
        with pytest.raises(DoesNotFitError) as caught:
            export_directory(bundle, bundle.variants[0], out / "engine", pytest.fail)
        assert caught.value.available_bytes == 40960
        assert everything(out) == set()

    @pytest.mark.parametrize("title", [directories.CONFIG_FILE, directories.MANIFEST_FILE])
    def test_an_engine_whose_file_has_our_name_is_refused(self, tmp_path, out, title):
        files = make_files(tmp_path / "files")
        (files / title).write_bytes(b"{}")
        with BundleWriter(tmp_path / "odd.bundle") as writer:
            writer.add(files, make_config())
        assert title in failure("dir", tmp_path / "odd.bundle", out / "engine")["message"]

    def test_progress_ends_with_all_bytes(self, bundle, out):
        seen: list[tuple[int, int]] = []
        export_directory(bundle, bundle.variants[0], out / "engine", lambda *step: seen.append(step))
        total = sum(layer.size_bytes for layer in bundle.variants[0].manifest.layers)
        assert seen[-1] == (total, total)
        assert sorted(seen) == seen


class TestChoice:
    def test_several_engines_are_not_guessed_among(self, several, out):
        error = failure("dir", several.path, out / "engine")
        assert "orin-nano-8gb" in error["message"]
        assert "--profile" in error["hint"]

    def test_the_board_or_the_digest_says_which(self, several, out):
        first, second = several.variants
        assert (
            good_json("dir", several.path, out / "a", "--profile", "orin-nx-16gb")["digest"] == second.digest
        )
        assert good_json("dir", several.path, out / "b", "--variant", first.digest)["digest"] == first.digest
        assert failure("dir", several.path, out / "c", "--profile", "thor-t5000")["hint"].startswith("it has")
        result = run("dir", several.path, out / "c", "--profile", "x", "--variant", first.digest)
        assert result.exit_code == 2

    def test_one_path_too_many_is_wrong_usage(self, bundle, out):
        assert run("dir", bundle.path, out, out).exit_code == 2


class TestTriton:
    def test_a_model_has_its_config_and_one_version_with_all_that_it_runs(self, bundle, out):
        shown = good_json("triton", bundle.path, out / "models")
        (variant,) = bundle.variants
        version = Path(shown["path"])
        assert version == out / "models" / "tiny-int4" / "1"
        assert (shown["model"], shown["version"], shown["digest"]) == ("tiny-int4", 1, variant.digest)
        titles = {f"engine/{layer.title}" for layer in variant.manifest.layers}
        files = {"model.py", "requirements.txt", "engine", "engine/engine.json", "engine/manifest.json"}
        assert everything(version) == titles | files
        assert f"onnxruntime{variant.config.runtime_requires}" in (version / "requirements.txt").read_text()

    def test_the_model_is_decoupled_and_batched_as_asked(self, bundle, out):
        options = ("--max-batch", 8, "--preferred-batch", 4, "--preferred-batch", 8, "--queue-delay-us", 500)
        more = ("--queue-size", 7, "--instances", 2, "--threads", 3, "--context", 512, "--name", "chat")
        good_json("triton", bundle.path, out, *options, *more)
        config = read_config(out / "chat" / "config.pbtxt")
        assert (config["name"], config["backend"], config["max_batch_size"]) == ("chat", "python", 8)
        assert config["model_transaction_policy"] == {"decoupled": True}
        batching = config["dynamic_batching"]
        assert batching["preferred_batch_size"] == [4, 8]
        assert batching["max_queue_delay_microseconds"] == "500"
        assert batching["default_queue_policy"] == {"max_queue_size": 7}
        assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
        parameters = {key: item["string_value"] for key, item in config["parameters"].items()}
        assert parameters == {"threads": "3", "context_tokens": "512"}

    def test_the_next_engine_is_the_next_version_of_the_same_config(self, bundle, several, out):
        good_json("triton", bundle.path, out)
        config = (out / "tiny-int4" / "config.pbtxt").read_bytes()
        second = good_json("triton", several.path, out, "--profile", "orin-nano-8gb")
        assert second["version"] == 2
        third = good_json("triton", several.path, out, "--profile", "orin-nx-16gb", "--version", 9)
        assert third["version"] == 9
        assert (out / "tiny-int4" / "config.pbtxt").read_bytes() == config
        assert {path.name for path in (out / "tiny-int4").iterdir()} == {"config.pbtxt", "1", "2", "9"}

    def test_the_same_engine_is_refused_and_its_version_named(self, bundle, out):
        good_json("triton", bundle.path, out, "--version", 3)
        before = everything(out)
        assert "version 3" in failure("triton", bundle.path, out)["message"]
        assert everything(out) == before

    def test_a_taken_version_is_refused(self, bundle, several, out):
        good_json("triton", bundle.path, out)
        options = ("--profile", "orin-nx-16gb", "--version", 1)
        assert "version 1" in failure("triton", several.path, out, *options)["message"]

    def test_other_options_do_not_quietly_change_the_versions_before(self, bundle, several, out):
        good_json("triton", bundle.path, out)
        options = ("--profile", "orin-nx-16gb", "--max-batch", 2)
        before = everything(out)
        assert "--keep-config" in failure("triton", several.path, out, *options)["hint"]
        assert everything(out) == before
        good_json("triton", several.path, out, *options, "--keep-config")
        assert read_config(out / "tiny-int4" / "config.pbtxt")["max_batch_size"] == 4

    def test_a_directory_without_a_config_is_not_a_model(self, bundle, out):
        (out / "tiny-int4").mkdir()
        assert "config.pbtxt" in failure("triton", bundle.path, out)["message"]
        assert everything(out) == {"tiny-int4"}

    def test_a_link_in_place_of_the_model_is_refused(self, bundle, out, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (out / "tiny-int4").symlink_to(tmp_path / "elsewhere")
        failure("triton", bundle.path, out)
        assert everything(tmp_path / "elsewhere") == set()

    @pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", 'a"b'])
    def test_a_name_that_leads_elsewhere_is_refused(self, bundle, out, name):
        with pytest.raises(EdgellmError, match="no name"):
            export_triton(bundle, bundle.variants[0], out, ServingOptions(), model=name or "/")
        assert everything(out) == set()

    def test_an_engine_for_another_runtime_is_refused(self, tmp_path, out):
        with BundleWriter(tmp_path / "rt.bundle") as writer:
            writer.add(make_files(tmp_path / "files"), make_config(runtime="tensorrt"))
        assert "tensorrt" in failure("triton", tmp_path / "rt.bundle", out)["message"]

    def test_a_damaged_engine_leaves_no_model_behind(self, bundle, out):
        layer = bundle.variants[0].manifest.layers[0]
        bundle.blob_path(layer.digest).write_bytes(b"other")
        with pytest.raises(BundleError):
            export_triton(bundle, bundle.variants[0], out, ServingOptions())
        assert everything(out) == set()


class TestConfig:
    names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True)
    options = st.integers(1, 64).flatmap(
        lambda most: st.builds(
            ServingOptions,
            max_batch=st.just(most),
            preferred_batches=st.lists(st.integers(1, most), max_size=4).map(tuple),
            queue_delay_us=st.integers(0, 60_000_000),
            queue_size=st.integers(1, 1_000_000),
            instances=st.integers(1, 64),
            threads=st.integers(0, 1024),
            context_tokens=st.integers(2, 1 << 24),
        )
    )

    @given(names, options)
    def test_whatever_is_asked_for_is_what_protobuf_reads(self, tmp_path_factory, name, options):
        path = tmp_path_factory.mktemp("config") / "config.pbtxt"
        path.write_text(config_pbtxt(name, options))
        config = read_config(path)
        assert (config["name"], config["max_batch_size"]) == (name, options.max_batch)
        batching = config["dynamic_batching"]
        assert batching["preferred_batch_size"] == sorted(set(options.preferred_batches))
        assert int(batching["max_queue_delay_microseconds"]) == options.queue_delay_us
        assert batching["default_queue_policy"]["max_queue_size"] == options.queue_size
        assert config["instance_group"] == [{"count": options.instances, "kind": "KIND_CPU"}]

    def test_it_is_what_triton_s_own_schema_reads(self):
        """With NVIDIA's `tritonclient[grpc]`, which brings the schema; it is no dependency of ours."""
        schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
        from google.protobuf import text_format

        options = ServingOptions(max_batch=8, preferred_batches=(4, 8), queue_delay_us=100, instances=2)
        config = text_format.Parse(config_pbtxt("chat", options), schema.ModelConfig())
        assert config.model_transaction_policy.decoupled
        assert (config.backend, config.max_batch_size) == ("python", 8)
        assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
        assert config.dynamic_batching.max_queue_delay_microseconds == 100
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 64
        assert [(g.count, g.kind) for g in config.instance_group] == [(2, schema.ModelInstanceGroup.KIND_CPU)]
        assert config.version_policy.latest.num_versions == 1
        ragged = {item.name: item.allow_ragged_batch for item in config.input}
        assert ragged["input_ids"]
        assert all(item.optional for item in config.input)
        assert config.parameters["context_tokens"].string_value == "2048"

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"max_batch": 0}, "max_batch is 0"),
            ({"queue_delay_us": -1}, "queue_delay_us is -1"),
            ({"queue_size": 0}, "queue_size is 0"),
            ({"instances": 0}, "instances is 0"),
            ({"threads": -1}, "threads is -1"),
            ({"context_tokens": 1}, "context_tokens is 1"),
            ({"max_batch": 2, "preferred_batches": (4,)}, r"preferred batch sizes \[4\]"),
        ],
    )
    def test_what_triton_would_refuse_is_refused_here(self, changes, named):
        with pytest.raises(EdgellmError, match=named):
            ServingOptions(**changes)
