"""What every layout of quantized checkpoints has in common: from a module's name to its linear map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.settings import FETCH_AGAIN, Settings
from edgellm_buildhost.checkpoint.tensor_files import TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.grid import Bits, QuantizedTensor
from edgellm_buildhost.quantization.layer import Linear
from edgellm_buildhost.quantized.packed import per_word

_KERNEL_GROUPS = (256, 128, 64, 32, 16)
CHOOSE_ANOTHER = "choose another checkpoint, or build from the unquantized one"


class Layout(ABC):
    """Reads the linears of one directory; `scheme` says in words how they are stored."""

    scheme: str
    marker: str
    """The last part of the tensor that only a quantized module has."""
    parts: frozenset[str]
    """The last parts of all tensors that a quantized module may have, beside `weight` and `bias`."""

    def __init__(self, files: TensorFiles, settings: Settings) -> None:
        """Of these files, `settings` being the part of the configuration that is about quantization."""
        self._files = files
        self._settings = settings

    def linear(self, module: str, shape: tuple[int, int]) -> Linear:
        """The linear `[out, in]` of a module, floats where it was left unquantized; raises BuildError."""
        if f"{module}.{self.marker}" in self._files:
            linear = self._quantized(module, shape)
            if not isinstance(linear, QuantizedTensor):
                return linear
            return cut_groups(linear, f"{self._files.directory}: {module}")
        if f"{module}.weight" in self._files:
            return self._files.floats(f"{module}.weight", shape)
        raise BuildError(
            f"{self._files.directory}: there is neither {module}.{self.marker} nor {module}.weight",
            FETCH_AGAIN,
        )

    def input_factor(self, module: str, columns: int) -> NDArray[np.float32] | None:
        """What each input is multiplied by before the module, `[in]`; None where that is folded in."""
        del module, columns
        return None

    def divided(self, columns: int, group_size: int, module: str) -> int:
        """Groups in a row; raises BuildError unless they fill it."""
        if columns % group_size:
            raise BuildError(
                f"{self._settings.path}: group_size {group_size} does not divide the {columns} inputs of "
                f"{module}",
                CHOOSE_ANOTHER,
            )
        return columns // group_size

    def words(self, width: int, bits: Bits, module: str) -> int:
        """32-bit words that `width` integers are packed in; raises BuildError unless they fill them."""
        if width % per_word(bits):
            raise BuildError(
                f"{self._files.directory}: {module} is {width} wide, and a word holds {per_word(bits)} "
                f"integers of {bits} bits",
                CHOOSE_ANOTHER,
            )
        return width // per_word(bits)

    def has_use_for(self, name: str, modules: Collection[str]) -> bool:
        """Whether a tensor that the family does not know is part of one of these quantized modules.

        So is a bias of zeros, which some writers give to every module.
        """
        module, _, part = name.rpartition(".")
        if module not in modules:
            return False
        if part == "bias":
            return not self._files.floats(name, self._files.stored(name).shape).any()
        return part in self.parts

    @abstractmethod
    def _quantized(self, module: str, shape: tuple[int, int]) -> Linear:
        """The linear of a quantized module; raises BuildError."""


def bits_of(settings: Settings, field: str = "bits") -> Bits:
    """4 or 8; raises BuildError for other widths."""
    settings.must_be(field, (4, 8))
    return 4 if settings.positive(field, 4) == 4 else 8


def group_size_of(settings: Settings, field: str = "group_size") -> int | None:
    """Inputs that share a scale; None for -1 or null, which mean all of a row."""
    value = settings.get(field)
    return None if value is None or value == -1 else settings.positive(field)


def cut_groups(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """The same weights in groups that kernels have: larger ones are cut up, each piece with their scale.

    A whole row that no group divides is filled up with its last code. Several groups of such a size can be
    neither cut nor filled up: raises BuildError with the `name` of the linear.
    """
    if tensor.group_size in _KERNEL_GROUPS:
        return tensor
    size = next((size for size in _KERNEL_GROUPS if tensor.group_size % size == 0), _KERNEL_GROUPS[-1])
    missing = -tensor.group_size % size
    if missing and tensor.groups > 1:
        raise BuildError(
            f"{name} has groups of {tensor.group_size} inputs, and kernels take multiples of {size}",
            "give the float checkpoint that it was made from, or one with another group size",
        )
    codes = np.pad(tensor.codes, ((0, 0), (0, 0), (0, missing)), mode="edge") if missing else tensor.codes
    pieces = codes.shape[2] // size

    def repeated(values: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(values, pieces, axis=1)

    return QuantizedTensor(
        bits=tensor.bits,
        columns=tensor.columns,
        codes=codes.reshape(tensor.rows, -1, size),
        scales=repeated(tensor.scales),
        zero_points=None if tensor.zero_points is None else repeated(tensor.zero_points),
        minima=None if tensor.minima is None else repeated(tensor.minima),
    )
