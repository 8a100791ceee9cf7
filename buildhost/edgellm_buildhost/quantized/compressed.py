"""Reads the pack-quantized layout of compressed-tensors (LLM Compressor, vLLM), weights alone.

Of a linear `[out, in]` there are `weight_packed` int32 `[out, in * bits / 32]` with neighbouring inputs in a
word, `weight_scale` `[out, groups]`, and where the grid has zero points `weight_zero_point` int32 `[out *
bits / 32, groups]`: w = (q - zero) * scale, all integers stored with half of their range added.
"""

from __future__ import annotations

import numpy as np

from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.checkpoint.tensor_files import TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantized.layout import CHOOSE_ANOTHER, Layout, bits_of, group_size_of
from edgellm_buildhost.quantized.packed import per_word, unpack_first, unpack_last

_INT32 = [np.dtype(np.int32)]


class CompressedLayout(Layout):
    """Four or eight bits, with or without zero points."""

    marker = "weight_packed"
    parts = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_g_idx"})

    def __init__(self, files: TensorFiles, settings: Settings) -> None:
        """Check the settings; raises BuildError for what is not read."""
        super().__init__(files, settings)
        settings.must_be("format", ("pack-quantized",))
        weights = _weights(settings)
        weights.must_be("type", ("int",))
        weights.must_be("strategy", ("group", "channel"))
        weights.must_be("actorder", (None, "weight", "static"))
        self._bits = bits_of(weights, "num_bits")
        self._group_size = group_size_of(weights)
        self._symmetric = weights.flag("symmetric")
        if not self._symmetric:
            self.parts |= {"weight_zero_point"}
        kind = "symmetric" if self._symmetric else "integer zero points"
        self.scheme = f"int{self._bits}, {kind}, groups of {self._group_size or 'a row'}, compressed-tensors"

    def _quantized(self, module: str, shape: tuple[int, int]) -> QuantizedTensor:
        rows, columns = shape
        bits, packed = self._bits, per_word(self._bits)
        size = self._group_size or columns
        groups = self.divided(columns, size, module)
        if f"{module}.weight_g_idx" in self._files:
            raise BuildError(
                f"{self._files.directory}: {module} has its inputs in activation order (weight_g_idx)",
                CHOOSE_ANOTHER,
            )
        words = self._files.read(f"{module}.weight_packed", _INT32, (rows, -(-columns // packed)))
        zero_points = None
        if not self._symmetric:
            stored = self._files.read(f"{module}.weight_zero_point", _INT32, (-(-rows // packed), groups))
            zero_points = np.ascontiguousarray(unpack_first(stored, bits)[:rows])
        codes = np.ascontiguousarray(unpack_last(words, bits)[:, :columns])
        return QuantizedTensor(
            bits=bits,
            columns=columns,
            codes=codes.reshape(rows, groups, size),
            scales=self._files.floats(f"{module}.weight_scale", (rows, groups)),
            zero_points=zero_points,
        )


def _weights(settings: Settings) -> Settings:
    """How the weights of the one group of modules are quantized; its activations are not."""
    groups = settings.section("config_groups")
    only = next(iter(settings.get("config_groups")), None) if groups is not None else None
    group = groups.section(only) if groups is not None and only is not None else None
    weights = None if group is None else group.section("weights")
    if group is None or weights is None:
        raise settings.wrong("config_groups", "an object with one group that has weights")
    if len(settings.get("config_groups")) > 1:
        raise settings.error("config_groups", "has several groups, which is not read", CHOOSE_ANOTHER)
    group.must_be("input_activations", (None,))
    return weights
