"""Where our tensors are in a family's files: under which name, and in which rows of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from edgellm_buildhost.architecture import EMBEDDING, HEAD, LINEARS, Architecture, tensor_shapes

_OURS = "model."
# Angles that old versions of transformers saved; they follow from the configuration.
_IGNORED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass(frozen=True)
class Place:
    """Rows `start` to `stop` of the stored tensor `name`; `offset` is added to every value."""

    name: str
    start: int
    stop: int
    offset: float = 0.0


class StoredNames:
    """From our names to places in the files of one checkpoint."""

    def __init__(self, architecture: Architecture, stored: Collection[str]) -> None:
        """Of a checkpoint with `stored` names; which form of a prefix it has, they tell."""
        self._storage = architecture.storage
        self._shapes = tensor_shapes(architecture)
        self._stored = stored
        self._forms = _prefix_forms(architecture.storage.prefix)
        self._form = next(
            (form for form in self._forms if form + EMBEDDING.removeprefix(_OURS) in stored), _OURS
        )
        self._fused = {
            part: (whole, parts.index(part), parts)
            for whole, parts in architecture.storage.fused.items()
            for part in parts
        }

    def place(self, name: str) -> Place:
        """Where the tensor of our `name` is."""
        rows = self._shapes[name][0]
        layer, _, part = name.rpartition("model.layers.")[2].partition(".")
        stem, _, kind = part.rpartition(".")
        if stem in self._fused and name.startswith("model.layers."):
            whole, index, parts = self._fused[stem]
            sizes = [self._shapes[f"model.layers.{layer}.{other}.weight"][0] for other in parts]
            start = sum(sizes[:index])
            return Place(self._named(f"model.layers.{layer}.{whole}.{kind}"), start, start + rows)
        is_gain = kind == "weight" and stem not in LINEARS and name not in {EMBEDDING, HEAD}
        return Place(self._named(name), 0, rows, self._storage.norm_offset if is_gain else 0.0)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor that the architecture needs, by its stored name."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self._shapes.items():
            place = self.place(name)
            rows = max(place.stop, found.get(place.name, (0,))[0])
            found[place.name] = (rows, *shape[1:])
        return found

    def unexpected(self) -> list[str]:
        """Stored tensors of the decoder's layers that the architecture knows nothing of."""
        known, layers = set(self.shapes()), f"{self._form}layers."
        return sorted(
            name
            for name in self._stored
            if name.startswith(layers) and name not in known and not _IGNORED.search(name)
        )

    def _named(self, name: str) -> str:
        if name.startswith(_OURS):
            return self._form + name.removeprefix(_OURS)
        # A head lies beside the model, with the prefix in front or without.
        prefixed = self._storage.prefix + name
        return prefixed if prefixed in self._stored else name


def _prefix_forms(prefix: str) -> tuple[str, ...]:
    """What may stand for `model.`: transformers has written the prefix before it and behind it."""
    return (_OURS,) if not prefix else (prefix + _OURS, _OURS + prefix, _OURS)
