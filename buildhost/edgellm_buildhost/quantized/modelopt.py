"""Reads NVIDIA ModelOpt's unified Hugging Face layout, and the further forms that we write in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.checkpoint.tensor_files import StoredTensor, TensorFiles
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.quantization.layer import Linear
from edgellm_buildhost.quantized.forms import ALGORITHMS, Form, decode, form_of
from edgellm_buildhost.quantized.layout import CHOOSE_ANOTHER, Layout

MIXED = "MIXED_PRECISION"
_PARTS = ("weight", "weight_scale", "input_scale", "weight_zero_point", "weight_minimum")
# Scales and offsets of a KV cache: engines here calibrate their own, in their own form.
_UNUSED = tuple(f".self_attn.{part}_proj.{part}_{kind}" for part in "kv" for kind in ("scale", "bias"))


class ModelOptLayout(Layout):
    """Each linear in one of `ALGORITHMS`; the tensors themselves say in which, and with which groups."""

    marker = "weight_scale"
    parts = frozenset({*_PARTS, "weight_scale_2", "pre_quant_scale"})

    def __init__(self, files: TensorFiles, settings: Settings) -> None:
        """Check that every algorithm is one that is read; raises BuildError."""
        super().__init__(files, settings)
        for field, name in _algorithms(settings):
            if name not in ALGORITHMS:
                raise settings.error(
                    field, f"{name!r} is not read", f"read: {', '.join(ALGORITHMS)}; {CHOOSE_ANOTHER}"
                )
        self.scheme = scheme_of(settings)

    def input_factor(self, module: str, columns: int) -> NDArray[np.float32] | None:
        """The smoothing scales of AWQ and SmoothQuant that ModelOpt did not fold in."""
        name = f"{module}.pre_quant_scale"
        if name not in self._files:
            return None
        factor = self._files.floats(name, (columns,))
        if (factor <= 0).any():
            raise BuildError(f"{self._files.stored(name).path}: {name} should be positive", CHOOSE_ANOTHER)
        return factor

    def has_use_for(self, name: str, modules: Collection[str]) -> bool:
        """As in every layout; the scales of a KV cache are known, but not used."""
        return name.endswith(_UNUSED) or super().has_use_for(name, modules)

    def _quantized(self, module: str, shape: tuple[int, int]) -> Linear:
        return decode(self._files, module, shape, self._form(module, shape[1]))

    def _form(self, module: str, columns: int) -> Form:
        present = {part: self._files.stored(f"{module}.{part}") for part in _PARTS if self._has(module, part)}
        if "weight" not in present or self._has(module, "weight_scale_2"):
            raise BuildError(
                f"{self._files.directory}: the tensors of {module} have no form that is read", CHOOSE_ANOTHER
            )
        _check_groups(present["weight"], present["weight_scale"], columns, module)
        form = form_of({part: (stored.kind, stored.shape) for part, stored in present.items()})
        assert form is not None  # noqa: S101 - there is a weight_scale, or nobody had asked
        return form

    def _has(self, module: str, part: str) -> bool:
        return f"{module}.{part}" in self._files


def _check_groups(weight: StoredTensor, scale: StoredTensor, columns: int, module: str) -> None:
    """Raises BuildError unless the shapes of the two give groups that fill a row of `columns`."""
    if len(weight.shape) not in {2, 3}:
        raise BuildError(
            f"{weight.path}: tensor {module}.weight has shape {list(weight.shape)}, it should be a matrix",
            CHOOSE_ANOTHER,
        )
    if len(scale.shape) < 2:
        return
    groups = scale.shape[1]
    fill = groups > 0 and columns % groups == 0
    if not fill or (len(weight.shape) == 3 and weight.shape[2] != columns // groups):
        raise BuildError(
            f"{scale.path}: tensor {module}.weight_scale has shape {list(scale.shape)}, which does not "
            f"divide {columns} inputs into groups",
            CHOOSE_ANOTHER,
        )


def scheme_of(settings: Settings) -> str:
    """What the configuration says of the linears, in words."""
    ours = settings.get("scheme")
    if isinstance(ours, str):
        return ours
    counts: dict[str, int] = {}
    for _, name in _algorithms(settings):
        counts[name] = counts.get(name, 0) + 1
    group_size = settings.get("group_size")
    groups = f", groups of {group_size}" if isinstance(group_size, int) else ""
    return f"{' and '.join(sorted(counts))}{groups}, ModelOpt's layout"


def _algorithms(settings: Settings) -> Iterator[tuple[str, str]]:
    """The field and the name of every algorithm that is in use."""
    if settings.get("quant_algo") is None:
        return
    name = settings.text("quant_algo")
    if name != MIXED:
        yield "quant_algo", name
        return
    layers: Mapping[str, Any] = settings.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise settings.wrong("quantized_layers", "an object with an entry for each module")
    for module, entry in layers.items():
        yield f"quantized_layers.{module}", str(entry.get("quant_algo"))
