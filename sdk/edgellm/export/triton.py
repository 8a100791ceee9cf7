"""Writes an engine into a Triton model repository: NAME/config.pbtxt, and NAME/VERSION with what runs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from edgellm.bundle import Bundle, Variant
from edgellm.bundle import digest as digests
from edgellm.bundle.layout import OnProgress
from edgellm.errors import BundleError, EdgellmError
from edgellm.export.directory import MANIFEST_FILE, staged, write_engine, write_synced
from edgellm.export.triton_config import ServingOptions, config_pbtxt

CONFIG_FILE = "config.pbtxt"
MODEL_FILE = "model.py"
REQUIREMENTS_FILE = "requirements.txt"
ENGINE_FOLDER = "engine"
"""Apart from model.py: a version's directory is on Python's path, where no file of an engine may be."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class TritonExport:
    """What was written, and where."""

    model: str
    version: int
    path: Path
    digest: str


def export_triton(
    bundle: Bundle,
    variant: Variant,
    repository: Path,
    options: ServingOptions,
    *,
    model: str | None = None,
    version: int | None = None,
    keep_config: bool = False,
    on_progress: OnProgress | None = None,
) -> TritonExport:
    """Adds an engine as a version of a model, whose config.pbtxt is made with the first one.

    Args:
        bundle: Where the blobs lie; every digest is checked while they are copied.
        variant: The engine.
        repository: The model repository; made if there is none.
        options: How Triton serves it.
        model: Name of the model; default: the engine's.
        version: Number of the version; default: the one after the last.
        keep_config: Leave a config.pbtxt that says something else than `options` as it is.
        on_progress: Called with the bytes copied so far and the bytes in all.

    Raises:
        BundleError: The engine or the version is there already, or a blob is missing or changed.
        EdgellmError: The engine is for another runtime, or the config.pbtxt that is there says otherwise.
        DoesNotFitError: The disk has no room for the files.
        OSError: The disk cannot be written.
    """
    if variant.config.runtime != "onnxruntime":
        raise EdgellmError(
            f"the engine is for {variant.config.runtime}, and what is exported runs ONNX Runtime",
            "choose another variant of the bundle",
        )
    name = _checked_name(model or variant.config.name)
    home, config = repository / name, config_pbtxt(name, options)
    number = _next_version(home, variant, version)
    export = TritonExport(name, number, home / str(number), variant.digest)
    if home.exists():
        _check_config(home / CONFIG_FILE, config, keep_config)
        with staged(export.path) as folder:
            _write_version(bundle, variant, folder, on_progress)
        return export
    # The model appears as a whole: a server that watches the repository never sees half of one.
    with staged(home) as folder:
        write_synced(folder / CONFIG_FILE, config.encode())
        (folder / str(number)).mkdir()
        _write_version(bundle, variant, folder / str(number), on_progress)
    return export


def _write_version(bundle: Bundle, variant: Variant, folder: Path, on_progress: OnProgress | None) -> None:
    (folder / ENGINE_FOLDER).mkdir()
    write_engine(bundle, variant, folder / ENGINE_FOLDER, on_progress)
    source = resources.files("edgellm.export").joinpath("triton_model.py").read_bytes()
    write_synced(folder / MODEL_FILE, source)
    write_synced(folder / REQUIREMENTS_FILE, _requirements(variant).encode())


def _requirements(variant: Variant) -> str:
    """What the Python of Triton's backend needs; its container has numpy alone."""
    return f"numpy>=1.26\nonnxruntime{variant.config.runtime_requires}\ntokenizers>=0.21\n"


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise EdgellmError(f"{name!r:.80} is no name for a model", "use letters, digits, '.', '_' and '-'")
    return name


def _next_version(home: Path, variant: Variant, asked: int | None) -> int:
    """The number to write; raises BundleError if it is taken, or the same engine has another one."""
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        raise BundleError(f"{home} is not a directory", "choose another repository, or another --name")
    found = [path for path in home.iterdir() if _VERSION.fullmatch(path.name)] if home.exists() else []
    for path in found:
        if _digest_of(path) == variant.digest:
            raise BundleError(
                f"{home} has this engine already, as version {path.name}",
                "nothing is to be done; to serve it otherwise, edit config.pbtxt",
            )
    numbers = {int(path.name) for path in found}
    number = max(numbers, default=0) + 1 if asked is None else asked
    if number in numbers or not _VERSION.fullmatch(str(number)):
        raise BundleError(
            f"version {number} of {home.name} is taken, or no version",
            "leave --version away for the next one",
        )
    return number


def _digest_of(version: Path) -> str | None:
    """Digest of the engine in a version; None if it is not one of ours."""
    try:
        return digests.of_bytes((version / ENGINE_FOLDER / MANIFEST_FILE).read_bytes())
    except OSError:
        return None


def _check_config(path: Path, wanted: str, keep: bool) -> None:
    """One config.pbtxt serves all versions, so a second export may not quietly say something else."""
    if not path.is_file():
        raise EdgellmError(
            f"{path.parent} is there, but has no {CONFIG_FILE}",
            "choose another repository, or another --name",
        )
    if not keep and path.read_text(encoding="utf-8", errors="replace") != wanted:
        raise EdgellmError(
            f"{path} says something else than these options",
            "give the options of the first export, or --keep-config to leave that file as it is",
        )
