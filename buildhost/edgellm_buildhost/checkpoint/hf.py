"""Reads a Hugging Face directory: config.json, tokenizer files, safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost import families  # as a module: it imports from this package, too
from edgellm_buildhost.architecture import HEAD
from edgellm_buildhost.checkpoint.base import Checkpoint, wrong_shape
from edgellm_buildhost.checkpoint.hf_tokenizer import read_tokenizer
from edgellm_buildhost.checkpoint.settings import FETCH_AGAIN, Settings
from edgellm_buildhost.checkpoint.stored import StoredNames
from edgellm_buildhost.checkpoint.tensor_files import FLOATS, TensorFiles
from edgellm_buildhost.errors import BuildError

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
"""In what ModelOpt quantized."""
QUANTIZATION = "quantization_config"
"""The field of config.json that other quantizers write, and ModelOpt too."""


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as `huggingface-cli download` leaves it."""

    def __init__(self, directory: Path) -> None:
        """Read and check the metadata and the headers of the weights.

        Raises BuildError naming the file and field, or the tensor.
        """
        self.name = directory.resolve().name
        self.directory = directory
        config = Settings.read(directory / CONFIG_FILE)
        self.architecture = families.read_architecture(config)
        self._files = TensorFiles(directory)
        self._names = StoredNames(self.architecture, self._files.shapes)
        self._shapes = self._names.shapes()
        self._check_tensors(directory)
        self.tokenizer = read_tokenizer(directory, config)

    def _read(self, name: str) -> NDArray[np.float32]:
        place = self._names.place(name)
        return self._read_rows(name, 0, place.stop - place.start)

    def _read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        place = self._names.place(name)
        stored = self._files.read(place.name, FLOATS, self._shapes[place.name])
        # A copy, also of what is float32 already: it is the caller's, and the file may go.
        values = np.array(stored[place.start + start : min(place.start + stop, place.stop)], np.float32)
        return values + np.float32(place.offset) if place.offset else values

    def _check_tensors(self, directory: Path) -> None:
        for name, expected in self._shapes.items():
            if name not in self._files:
                raise self._missing(directory, name)
            stored = self._files.stored(name)
            if stored.shape != expected:
                raise wrong_shape(str(stored.path), name, stored.shape, expected)
            if stored.kind not in FLOATS:
                raise BuildError(
                    f"{stored.path}: tensor {name} has type {stored.type_name}, floating point is needed",
                    "give the unquantized checkpoint that this one was made from",
                )
        unexpected = self._names.unexpected()
        if unexpected:
            raise BuildError(
                f"{directory}: there is a tensor {unexpected[0]}, which a {self.architecture.family} model "
                f"with this {CONFIG_FILE} does not have",
                "the weights and the configuration belong to different models: fetch both again "
                "from one place",
            )

    def _missing(self, directory: Path, name: str) -> BuildError:
        if name.endswith(HEAD):
            return BuildError(
                f"{directory / CONFIG_FILE}: tie_word_embeddings is false, but there is no tensor {name}",
                FETCH_AGAIN,
            )
        return BuildError(f"{directory}: no tensor {name} in the safetensors files", FETCH_AGAIN)
