"""Runs an engine's graph in ONNX Runtime: for the canary, KV scales, the quality report and the profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from packaging.specifiers import SpecifierSet

_KV_DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def runs_here(requires: str) -> bool:
    """Whether the ONNX Runtime that is installed here is one of those, as in ">=1.23,<1.33"."""
    return SpecifierSet(requires).contains(ort.__version__, prereleases=True)


@dataclass(frozen=True)
class BoundStep:
    """A step with its inputs and outputs in place: every run computes the same over the same memory."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    arrays: tuple[NDArray[Any], ...]
    """ONNX Runtime keeps no reference to what is bound."""

    def run(self) -> None:
        """Compute it."""
        self.session.run_with_iobinding(self.binding)


class Runner:
    """A loaded graph and its KV cache, updated in place; takes the memory of both.

    `caches` are by the names of the graph's inputs, `kv_key_0` and so on, float32 or int8 as the graph has
    them, `[rows, kv_heads, capacity, head_dim]`: zeros until tokens are fed.
    """

    def __init__(
        self, graph: Path, capacity: int, *, rows: int = 1, options: ort.SessionOptions | None = None
    ) -> None:
        """Load `graph` for `rows` sequences of up to `capacity` tokens; raises what ONNX Runtime raises.

        `options` are ONNX Runtime's own where None; errors alone are logged in either case.
        """
        options = options or ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.caches: dict[str, NDArray[Any]] = {
            item.name: np.zeros((rows, item.shape[1], capacity, item.shape[3]), _KV_DTYPES[item.type])
            for item in self.session.get_inputs()
            if item.name.startswith("kv_")
        }
        self._rows = rows
        self._capacity = capacity

    def feed(self, tokens: NDArray[np.int64], past: int, logits: NDArray[np.float32] | None = None) -> None:
        """Compute a step once, as `bind` describes it."""
        self.bind(tokens, past, logits).run()

    def bind(
        self, tokens: NDArray[np.int64], past: int, logits: NDArray[np.float32] | None = None
    ) -> BoundStep:
        """The step that puts `tokens`, int64 `[rows, tokens]`, behind `past` cached ones in each row.

        `logits`, float32 `[rows * n, vocab_size]`, is filled with those of the last n tokens of each row: 1
        for what comes next, all for what a text is worth; None computes none. Raises ValueError for tokens
        that have no room.
        """
        rows, count = tokens.shape
        if rows != self._rows or past < 0 or past + count > self._capacity:
            room = f"{self._rows} rows of {self._capacity}"
            raise ValueError(f"{rows} rows of {count} tokens behind {past}: there is room for {room}")
        positions = np.arange(rows * count, dtype=np.int64).reshape(rows, count)
        wanted = 0 if logits is None else len(logits) // rows
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(tokens),
            "past_len": np.full(rows, past, np.int32),
            "query_len": np.full(rows, count, np.int32),
            "logit_index": positions[:, count - wanted :].ravel(),
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        if logits is None:
            binding.bind_output("logits")
        else:
            binding.bind_output("logits", *_place(logits))
        for name, cache in self.caches.items():
            binding.bind_input(name, *_place(cache))
            binding.bind_output(f"{name}_out", *_place(cache))
        kept = () if logits is None else (logits,)
        return BoundStep(self.session, binding, (*feeds.values(), *self.caches.values(), *kept))


def _place(array: NDArray[Any]) -> tuple[Any, ...]:
    """As a binding takes it: device, its number, type, shape and address."""
    return "cpu", 0, array.dtype, array.shape, array.ctypes.data
