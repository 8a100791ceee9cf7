"""A directory of quantized weights, in any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import EMBEDDING, HEAD, LINEARS, Architecture, layer_tensor, tensor_shapes
from edgellm_buildhost.checkpoint.base import TokenizerFiles, check_finite
from edgellm_buildhost.checkpoint.stored import StoredNames
from edgellm_buildhost.checkpoint.tensor_files import FLOATS, TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.layer import Linear
from edgellm_buildhost.quantization.rows import take_rows
from edgellm_buildhost.quantized.base import QuantizedCheckpoint
from edgellm_buildhost.quantized.folding import Folding
from edgellm_buildhost.quantized.layout import CHOOSE_ANOTHER, Layout

_LAYERS = "model.layers."


class StoredCheckpoint(QuantizedCheckpoint):
    """Names and rows by the family, linears by the layout; memory follows the largest stored matrix."""

    def __init__(
        self,
        directory: Path,
        architecture: Architecture,
        tokenizer: TokenizerFiles,
        files: TensorFiles,
        layout: Layout,
    ) -> None:
        """Check that nothing is missing; raises BuildError naming the tensor."""
        self.name = directory.resolve().name
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.scheme = layout.scheme
        self._files = files
        self._layout = layout
        self._names = StoredNames(architecture, files.shapes)
        self._shapes = self._names.shapes()
        self._folding = Folding(architecture, self._input_factor)
        self._check()

    def linear(self, layer: int, part: str) -> Linear:
        """A linear map of a layer, with everything in it that was left beside it."""
        place = self._names.place(layer_tensor(layer, part))
        matrix = self._layout.linear(_module(place.name), self._shape(place.name))
        return self._folding.linear(layer, part, take_rows(matrix, slice(place.start, place.stop)))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A gain or a bias."""
        place = self._names.place(name)
        stored = self._files.floats(place.name, self._shapes[place.name])[place.start : place.stop]
        values = stored + np.float32(place.offset) if place.offset else stored
        if not name.startswith(_LAYERS):
            return values
        layer, _, part = name.removeprefix(_LAYERS).partition(".")
        return self._folding.vector(int(layer), part, values)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of the embedding or the head; only these are read."""
        place = self._names.place(name)
        table = self._files.read(place.name, FLOATS, tensor_shapes(self.architecture)[name])
        values = np.asarray(table[start:stop], np.float32)
        check_finite(str(self._files.stored(place.name).path), place.name, values)
        return values

    def _input_factor(self, layer: int, part: str) -> NDArray[np.float32] | None:
        place = self._names.place(layer_tensor(layer, part))
        return self._layout.input_factor(_module(place.name), self._shape(place.name)[1])

    def _shape(self, stored_name: str) -> tuple[int, int]:
        rows, columns = self._shapes[stored_name]
        return rows, columns

    def _check(self) -> None:
        self._files.check_types()
        for name in tensor_shapes(self.architecture):
            stored = self._names.place(name).name
            if name in {EMBEDDING, HEAD} and f"{_module(stored)}.{self._layout.marker}" in self._files:
                raise BuildError(
                    f"{self._files.directory}: {_module(stored)} is quantized, which is not read",
                    CHOOSE_ANOTHER,
                )
            if not any(name.endswith(f"{part}.weight") for part in LINEARS):
                self._files.stored(stored)
        self._check_unexpected()

    def _check_unexpected(self) -> None:
        """What nobody here knows would be missing from the result in silence."""
        parts = [layer_tensor(layer, part) for layer in range(self.architecture.layers) for part in LINEARS]
        modules = {_module(self._names.place(part).name) for part in parts}
        for name in self._names.unexpected():
            if not self._layout.has_use_for(name, modules):
                raise BuildError(
                    f"{self._files.directory}: there is a tensor {name}, which neither a "
                    f"{self.architecture.family} model with this configuration nor the layout has",
                    CHOOSE_ANOTHER,
                )


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")
