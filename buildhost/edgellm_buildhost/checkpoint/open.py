"""Chooses the reader for a source by what it is: a directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.checkpoint.gguf import GGUF_MAGIC, GgufCheckpoint
from edgellm_buildhost.checkpoint.hf import CONFIG_FILE, MODELOPT_FILE, QUANTIZATION, HuggingFaceCheckpoint
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.errors import BuildError


def open_checkpoint(source: Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file; raises BuildError for anything else.

    The metadata is read and checked here, the tensors later, one at a time.
    """
    if source.is_dir():
        _refuse_quantized(source)
        return HuggingFaceCheckpoint(source)
    if not source.is_file():
        raise BuildError(
            f"{source}: no such file or directory", "give a Hugging Face directory or a .gguf file"
        )
    with source.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise BuildError(
            f"{source}: not a GGUF file (it starts with {magic!r})",
            "give a Hugging Face directory or a .gguf file; a file cut short or a web page saved in "
            "its place looks like this",
        )
    return GgufCheckpoint(source)


def quantized_by(directory: Path) -> str | None:
    """What says that the weights of a Hugging Face directory are quantized; None if they are floats.

    Raises BuildError for a config.json that is missing or damaged.
    """
    if (directory / MODELOPT_FILE).is_file():
        return MODELOPT_FILE
    in_config = Settings.read(directory / CONFIG_FILE).get(QUANTIZATION) is not None
    return f"{QUANTIZATION} in {CONFIG_FILE}" if in_config else None


def _refuse_quantized(directory: Path) -> None:
    said_by = quantized_by(directory)
    if said_by is not None:
        raise BuildError(
            f"{directory}: the checkpoint is quantized already ({said_by}), and floats are needed here",
            "give the unquantized checkpoint that it was made from; as it is, only "
            "edgellm_buildhost.quantized.open_quantized opens it",
        )
