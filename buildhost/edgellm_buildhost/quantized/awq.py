"""Reads AutoAWQ's layout (`quant_method: awq`, version gemm).

Of a linear `[out, in]` there are `qweight` int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]`, both
with neighbouring outputs in a word, interleaved, and `scales` `[groups, out]`: w = (q - zero) * scale. The
scales that AWQ searched are already in the weights and norms.
"""

from __future__ import annotations

import numpy as np

from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.checkpoint.tensor_files import TensorFiles
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantized.layout import Layout, group_size_of
from edgellm_buildhost.quantized.packed import AWQ_ORDER, unpack_last

_INT32 = [np.dtype(np.int32)]


class AwqLayout(Layout):
    """Four bits with integer zero points."""

    marker = "qweight"
    parts = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, files: TensorFiles, settings: Settings) -> None:
        """Check the settings; raises BuildError for a version other than gemm."""
        super().__init__(files, settings)
        settings.must_be("version", ("gemm", "GEMM", None))
        settings.must_be("bits", (4,))
        settings.must_be("zero_point", (True, None))
        self._group_size = group_size_of(settings)
        self.scheme = (
            f"int4, integer zero points, groups of {self._group_size or 'a row'}, awq (AutoAWQ's layout)"
        )

    def _quantized(self, module: str, shape: tuple[int, int]) -> QuantizedTensor:
        rows, columns = shape
        size = self._group_size or columns
        groups = self.divided(columns, size, module)
        files = self._files
        row_words = self.words(rows, 4, module)
        words = files.read(f"{module}.qweight", _INT32, (columns, row_words))
        zeros = files.read(f"{module}.qzeros", _INT32, (groups, row_words))
        scales = files.floats(f"{module}.scales", (groups, rows))
        codes = unpack_last(words, 4, AWQ_ORDER).T.reshape(rows, groups, size)
        return QuantizedTensor(
            bits=4,
            columns=columns,
            codes=np.ascontiguousarray(codes),
            scales=np.ascontiguousarray(scales.T),
            zero_points=np.ascontiguousarray(unpack_last(zeros, 4, AWQ_ORDER).T),
        )
