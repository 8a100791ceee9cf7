"""What the build host says about a build: sources by digest, options, tools, times (SLSA provenance v1).

https://slsa.dev/spec/v1.0/provenance. It is attached to the engine, so the engine's digest stays what its
files make it. Unsigned it is a note; `edgellm sign` has a key stand for it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import Json
from edgellm.signing import Envelope, Statement, times
from edgellm.signing.statements import PROVENANCE_TYPE
from edgellm_buildhost.errors import BuildError

BUILD_TYPE = "urn:edgellm:build:v1"
BUILDER = "urn:edgellm:buildhost"
# What the readers of a Hugging Face directory open.
_READ = ("*.json", "*.safetensors", "*.jinja")
# A checkpoint in more shards than this would not fit into an envelope.
MAX_SOURCES = 256
_TOOLS = (
    "edgellm",
    "gguf",
    "ml-dtypes",
    "numpy",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "tokenizers",
)


@dataclass(frozen=True)
class Sources:
    """The files of a checkpoint, by name and SHA-256 digest, as they were when the build began."""

    name: str
    files: Mapping[str, str]

    @classmethod
    def read(cls, source: Path) -> Sources:
        """Reads every byte of them once; raises BuildError for too many, OSError for an unreadable one."""
        if source.is_dir():
            paths = sorted({path for pattern in _READ for path in source.glob(pattern) if path.is_file()})
        else:
            paths = [source]
        if len(paths) > MAX_SOURCES:
            raise BuildError(
                f"{source}: {len(paths)} files, more than {MAX_SOURCES}",
                "keep one checkpoint in the directory",
            )
        return cls(source.resolve().name, {path.name: digests.of_file(path) for path in paths})


def envelope(engine: str, digest: str, sources: Sources, options: Mapping[str, str], began_s: float) -> bytes:
    """An unsigned envelope about the engine of that manifest digest, finished now.

    Args:
        engine: Its name.
        digest: Of its manifest.
        sources: What it was made from.
        options: What the user asked for: precision, kv, profile, name.
        began_s: Seconds since 1970.
    """
    statement = Statement(engine, digest, PROVENANCE_TYPE, _predicate(sources, options, began_s))
    return Envelope(statement.to_json()).to_json()


def _predicate(sources: Sources, options: Mapping[str, str], began_s: float) -> Json:
    files = [
        {"name": name, "digest": {"sha256": digests.hex_of(digest)}} for name, digest in sources.files.items()
    ]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"source": sources.name, **options},
            "resolvedDependencies": files,
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": tools()},
            "metadata": {"startedOn": times.to_text(began_s), "finishedOn": times.to_text(time.time())},
        },
    }


def tools() -> dict[str, str]:
    """Versions of what a build computes with."""
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # noqa: PERF203 - gguf is not needed for every source
            continue
    return versions
