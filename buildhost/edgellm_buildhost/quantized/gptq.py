"""Reads GPTQ's layout (`quant_method: gptq`), as AutoGPTQ, GPTQModel and Optimum write it.

Of a linear `[out, in]` there are `qweight` int32 `[in * bits / 32, out]` with neighbouring inputs in a word,
`qzeros` int32 `[groups, out * bits / 32]` with neighbouring outputs, `scales` `[groups, out]` and `g_idx`
`[in]`, the group of each input: w = (q - zero) * scale. The first version of the format stores zero - 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.checkpoint.tensor_files import TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantized.layout import CHOOSE_ANOTHER, Layout, bits_of, group_size_of
from edgellm_buildhost.quantized.packed import unpack_first, unpack_last

_INT32 = [np.dtype(np.int32)]


class GptqLayout(Layout):
    """Four or eight bits; `sym` says of all linears whether their grid is symmetric."""

    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, files: TensorFiles, settings: Settings) -> None:
        """Check the settings; raises BuildError for what is not read."""
        super().__init__(files, settings)
        settings.must_be("checkpoint_format", ("gptq", "gptq_v2", None))
        if settings.get("dynamic"):
            raise settings.error(
                "dynamic", "gives modules settings of their own, which is not read", CHOOSE_ANOTHER
            )
        self._bits = bits_of(settings)
        self._stored_less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        self._group_size = group_size_of(settings)
        self._symmetric = settings.flag("sym")
        kind = "symmetric" if self._symmetric else "integer zero points"
        self.scheme = f"int{self._bits}, {kind}, groups of {self._group_size or 'a row'}, gptq"

    def _quantized(self, module: str, shape: tuple[int, int]) -> QuantizedTensor:
        rows, columns = shape
        bits = self._bits
        size = self._group_size or columns
        groups = self.divided(columns, size, module)
        self._check_order(module, columns, size)
        words = self._files.read(f"{module}.qweight", _INT32, (self.words(columns, bits, module), rows))
        scales = self._files.floats(f"{module}.scales", (groups, rows))
        return QuantizedTensor(
            bits=bits,
            columns=columns,
            codes=np.ascontiguousarray(unpack_first(words, bits).T).reshape(rows, groups, size),
            scales=np.ascontiguousarray(scales.T),
            zero_points=self._zero_points(module, (groups, rows)),
        )

    def _zero_points(self, module: str, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
        """`[out, groups]`, None where the grid is symmetric; raises BuildError if it is not as `sym` says."""
        groups, rows = shape
        name = f"{module}.qzeros"
        words = self._files.read(name, _INT32, (groups, self.words(rows, self._bits, module)))
        stored = unpack_last(words, self._bits)
        half, mask = 1 << (self._bits - 1), (1 << self._bits) - 1
        zero_points = ((stored.astype(np.uint16) + self._stored_less) & mask).astype(np.uint8)
        if not self._symmetric:
            return np.ascontiguousarray(zero_points.T)
        if (zero_points != half).any():
            raise BuildError(
                f"{self._files.stored(name).path}: {name} has zero points other than {half}, but sym is true "
                f"in {self._settings.path.name}",
                f"if it is of the second version, checkpoint_format should be gptq_v2; else {CHOOSE_ANOTHER}",
            )
        return None

    def _check_order(self, module: str, columns: int, group_size: int) -> None:
        """Groups must hold neighbouring inputs: kernels of no runtime here gather them."""
        name = f"{module}.g_idx"
        if name not in self._files:
            return
        index = self._files.read(name, _INT32, (columns,))
        if not np.array_equal(index, np.arange(columns) // group_size):
            raise BuildError(
                f"{self._files.stored(name).path}: {name} puts inputs into groups by activation order "
                "(desc_act)",
                "choose a checkpoint made with desc_act false, or build from the unquantized one with "
                "--quant int4-gptq",
            )
