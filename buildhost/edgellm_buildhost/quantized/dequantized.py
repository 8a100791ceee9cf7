"""A quantized checkpoint as the float model that its codes stand for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.architecture import EMBEDDING, HEAD, LINEARS, layer_tensor, tensor_shapes
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.quantized.base import QuantizedCheckpoint


class DequantizedCheckpoint(Checkpoint):
    """Its tensors as floats, one at a time."""

    def __init__(self, quantized: QuantizedCheckpoint) -> None:
        """Of `quantized`."""
        self._quantized = quantized
        self.name = quantized.name
        self.architecture = quantized.architecture
        self.tokenizer = quantized.tokenizer
        layers = range(quantized.architecture.layers)
        self._linears = {layer_tensor(layer, part): (layer, part) for layer in layers for part in LINEARS}

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a table; of a linear map after all of it."""
        if name in {EMBEDDING, HEAD}:
            return self._quantized.rows(name, start, stop)
        return super().rows(name, start, stop)

    def _read(self, name: str) -> NDArray[np.float32]:
        if name in {EMBEDDING, HEAD}:
            return self._quantized.rows(name, 0, tensor_shapes(self.architecture)[name][0])
        if name not in self._linears:
            return self._quantized.vector(name)
        linear = self._quantized.linear(*self._linears[name])
        return linear if isinstance(linear, np.ndarray) else linear.dequantize()
