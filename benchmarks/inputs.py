"""What all benchmarks start from: the model, engines built from it, and a text that every machine has."""

from __future__ import annotations

import hashlib
import os
import pydoc_data.topics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tokenizers

import edgellm_buildhost
from edgellm.bundle import Bundle, BundleWriter
from edgellm.bundle.layout import Variant
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import QuantName

_TEXT_TOKENS = 940


@dataclass(frozen=True)
class BuiltEngine:
    """An engine: as a bundle to push, and as a directory of files to load."""

    bundle: Bundle
    variant: Variant
    files: Path

    def text(self, count: int = _TEXT_TOKENS) -> list[int]:
        """The first tokens of Python's own help texts."""
        return self.tokenizer().encode(_topics()).ids[:count]

    def prompts(self, count: int, tokens: int) -> list[str]:
        """Texts of about so many tokens each, all different from the first token on."""
        tokenizer = self.tokenizer()
        ids = tokenizer.encode(_topics()).ids
        return [tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(count)]

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The engine's tokenizer."""
        return tokenizers.Tokenizer.from_file(str(self.files / self.variant.config.files.tokenizer))


@dataclass(frozen=True)
class Inputs:
    """The model, a folder for what is worth keeping between runs, and how patient to be."""

    model: Path
    model_sha256: str
    cache: Path
    bandwidth_bytes_per_s: float
    rounds: int

    @property
    def peers(self) -> Path:
        """Where the peers' files are kept."""
        return self.cache / f"peers-{self.model_sha256[:12]}"

    def engine(self, precision: QuantName) -> BuiltEngine:
        """The engine that the build host makes today; built again when it or the model changes."""
        folder = self.cache / f"{precision.value}-{self.model_sha256[:12]}-{_build_host_digest()[:12]}"
        path = folder / "engine.bundle"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with BundleWriter(path) as writer, tempfile.TemporaryDirectory(dir=folder) as files:
                config = build_engine(open_checkpoint(self.model), precision, Path(files), profile="host")
                writer.add(Path(files), config)
        bundle = Bundle.open(path)
        return BuiltEngine(bundle, bundle.variants[0], _linked(bundle, bundle.variants[0], folder / "files"))


def _topics() -> str:
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _linked(bundle: Bundle, variant: Variant, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for layer in variant.manifest.layers:
        target = folder / layer.title
        if not target.exists():
            os.link(bundle.blob_path(layer.digest), target)
    return folder


def _build_host_digest() -> str:
    hasher = hashlib.sha256()
    for path in sorted(Path(edgellm_buildhost.__file__).parent.rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()
