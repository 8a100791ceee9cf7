"""What a bundle is made of: manifest, config, layout on disk, graph."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pydantic

from edgellm.bundle import Bundle, BundleWriter, EngineConfig, EngineManifest
from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import canonical_json
from edgellm.errors import BundleError, DoesNotFitError
from edgellm.memory import plan_memory
from edgellm_agent.runtimes.base import EngineLoadError
from edgellm_agent.runtimes.onnx_paths import check_graph
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import QuantName
from tests.fuzz.mutate import changed_json
from tests.fuzz.run import Target
from tests.support.tiny_bundle import make_config, make_files
from tests.support.tiny_models import make_tiny_hf


def _made(folder: Path) -> Bundle:
    """A bundle of a few bytes, in the folder above: the target's own stays as it is."""
    root = folder.parent / f"{folder.name}-made"
    root.mkdir()
    with BundleWriter(root / "tiny.bundle") as writer:
        writer.add(make_files(root / "files", weights=b"weights" * 99), make_config())
    return Bundle.open(root / "tiny.bundle")


def manifest(stack: ExitStack, folder: Path) -> Target:
    """The manifest's bytes, as `Prepare` and a fetch take them."""
    (variant,) = _made(folder).variants
    right = variant.config.to_json()

    def run(data: bytes) -> str:
        try:
            parsed = EngineManifest.parse(data)
            assert all("/" not in layer.title and layer.title not in {".", ".."} for layer in parsed.layers)
            parsed.parse_config(right)
        except BundleError:
            return "refused"
        return "taken"

    return Target("manifest", [variant.manifest.raw], run, changed_json, folder)


def config(stack: ExitStack, folder: Path) -> Target:
    """The config's bytes, under a digest that is right."""

    def run(data: bytes) -> str:
        try:
            EngineConfig.from_json(data)
        except pydantic.ValidationError:
            return "refused"
        return "taken"

    return Target("config", [make_config().to_json()], run, changed_json, folder)


def plan(stack: ExitStack, folder: Path) -> Target:
    """A config that is valid, and whose figures are then reckoned with."""

    def run(data: bytes) -> str:
        try:
            parsed = EngineConfig.from_json(data)
            plan_memory(parsed, available_bytes=8 << 30, headroom_bytes=1 << 30, max_sequences=4).to_proto()
        except pydantic.ValidationError:
            return "refused"
        except DoesNotFitError:
            return "does not fit"
        return "planned"

    return Target("plan", [make_config().to_json()], run, changed_json, folder)


def bundle(stack: ExitStack, folder: Path) -> Target:
    """A bundle on disk whose documents are changed, and named by the right digests all the same."""
    made = _made(folder)
    (variant,) = made.variants
    blobs = made.path / "blobs" / "sha256"
    inner = json.loads((made.path / "index.json").read_bytes())["manifests"][0]["digest"]
    documents = {
        "layout": json.loads((made.path / "oci-layout").read_bytes()),
        "outer": json.loads((made.path / "index.json").read_bytes()),
        "index": json.loads(made.blob_path(inner).read_bytes()),
        "manifest": json.loads(variant.manifest.raw),
        "config": json.loads(variant.config.to_json()),
    }
    old = {name: canonical_json(documents[name]) for name in ("config", "manifest", "index")}
    before = set(blobs.iterdir())

    def renamed(text: bytes, name: str, now: bytes) -> bytes:
        """Another document, with this one's new digest and size in the place of the old."""
        was = old[name]
        text = text.replace(digests.of_bytes(was).encode(), digests.of_bytes(now).encode())
        return text.replace(b'"size":%d' % len(was), b'"size":%d' % len(now))

    def write(data: bytes) -> None:
        try:
            changed = json.loads(data)
            texts = {name: canonical_json(changed[name]) for name in documents}
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = dict.fromkeys(documents, data)
        for name, holder in (("config", "manifest"), ("manifest", "index"), ("index", "outer")):
            texts[holder] = renamed(texts[holder], name, texts[name])
            (blobs / digests.hex_of(digests.of_bytes(texts[name]))).write_bytes(texts[name])
        (made.path / "oci-layout").write_bytes(texts["layout"])
        (made.path / "index.json").write_bytes(texts["outer"])

    def run(data: bytes) -> str:
        write(data)
        try:
            Bundle.open(made.path).verify()
        except BundleError:
            return "refused"
        finally:
            for path in set(blobs.iterdir()) - before:
                path.unlink()
        return "taken"

    return Target("bundle", [canonical_json(documents)], run, changed_json, folder)


def graph(stack: ExitStack, folder: Path) -> Target:
    """The bytes of a graph, before the runtime sees them."""
    (folder / "hf").mkdir()
    engine = folder / "engine"
    engine.mkdir()
    checkpoint = open_checkpoint(make_tiny_hf(folder / "hf"))
    files = build_engine(checkpoint, QuantName.INT8, engine, profile="orin-nano-8gb").files
    corpus = [(engine / title).read_bytes() for title in (files.graph, files.graph_ragged) if title]

    def run(data: bytes) -> str:
        (engine / "fuzzed.onnx").write_bytes(data)
        try:
            check_graph(engine / "fuzzed.onnx")
        except EngineLoadError:
            return "refused"
        finally:
            (engine / "fuzzed.onnx").unlink()
        return "taken"

    return Target("graph", corpus, run, folder=folder)
