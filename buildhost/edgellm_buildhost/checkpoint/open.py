"""Chooses the reader for a source by what it is: a directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.checkpoint.gguf import GgufCheckpoint
from edgellm_buildhost.checkpoint.hf import HuggingFaceCheckpoint
from edgellm_buildhost.errors import BuildError

_GGUF_MAGIC = b"GGUF"


def open_checkpoint(source: Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file; raises BuildError for anything else.

    The metadata is read and checked here, the tensors later, one at a time.
    """
    if source.is_dir():
        return HuggingFaceCheckpoint(source)
    if not source.is_file():
        raise BuildError(
            f"{source}: no such file or directory", "give a Hugging Face directory or a .gguf file"
        )
    with source.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise BuildError(
            f"{source}: not a GGUF file (it starts with {magic!r})",
            "give a Hugging Face directory or a .gguf file; a file cut short or a web page saved in "
            "its place looks like this",
        )
    return GgufCheckpoint(source)
