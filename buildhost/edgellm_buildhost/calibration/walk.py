"""Runs a float model one layer at a time, over windows of a text, in the memory of one layer.

    windows ─embed▶ hidden state ─layer 0▶ hidden state ─layer 1▶ ... ─norm, head▶ logits
                                  └─ statistics of what entered its linears

A layer is a graph of the dialect that engines are written in, so every family that can be built can be
calibrated, and ONNX Runtime's CUDA kernels are used where they are installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgellm_buildhost.architecture import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    Architecture,
    AttentionKind,
    layer_tensor,
    row_ranges,
)
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.layer import OUTPUTS, layer_graph
from edgellm_buildhost.progress import StageProgress
from edgellm_buildhost.quantization.layer import FloatLayer, InputStatistics, Point

_HEAD_CHUNK_BYTES = 256 << 20
_CUDA = "CUDAExecutionProvider"


class FloatModel:
    """A checkpoint's float model; it keeps no weights between calls but the rows of a small head."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Of `checkpoint`."""
        self._checkpoint = checkpoint
        self._sessions: dict[tuple[AttentionKind, int], ort.InferenceSession] = {}
        self._small_head: NDArray[np.float32] | None = None

    @property
    def architecture(self) -> Architecture:
        """The checkpoint's."""
        return self._checkpoint.architecture

    def embed(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Hidden states before the first layer, float32 [windows, tokens, hidden_size]."""
        used, places = np.unique(windows, return_inverse=True)
        table = np.empty((len(used), self.architecture.hidden_size), np.float32)
        for start, rows in self._table(EMBEDDING):
            here = (used >= start) & (used < start + len(rows))
            table[here] = rows[used[here] - start]
        scale = self.architecture.embedding_scale
        if scale is not None:
            table *= np.float32(scale)
        return table[places.reshape(windows.shape)]

    def layer(self, index: int) -> FloatLayer:
        """The weights of a layer."""
        read = self._checkpoint.tensor
        linears = {part: read(layer_tensor(index, part)) for part in LINEARS}
        prefix = f"model.layers.{index}."
        return FloatLayer(linears, {name: read(prefix + name) for name in self.architecture.vectors()})

    def run(self, index: int, floats: FloatLayer, hidden: NDArray[np.float32]) -> None:
        """Turn the hidden states before a layer into those behind it, in place."""
        for window, values in self._outputs(index, floats, hidden):
            hidden[window] = values["hidden"]

    def observe(
        self, index: int, floats: FloatLayer, hidden: NDArray[np.float32], *, advance: bool = True
    ) -> dict[Point, InputStatistics]:
        """Statistics of what enters the linears of a layer; the hidden states move on if `advance`.

        Raises BuildError when the layer computes values that are not finite.
        """
        sums: dict[Point, _Sums] = {}
        for window, values in self._outputs(index, floats, hidden):
            for point in Point:
                sums.setdefault(point, _Sums(values[point].shape[-1])).add(values[point][0])
            if not np.isfinite(values["hidden"]).all():
                raise BuildError(
                    f"layer {index} computes values that are not finite for the calibration text",
                    "check the checkpoint: its values overflow float32",
                )
            if advance:
                hidden[window] = values["hidden"]
        return {point: total.statistics() for point, total in sums.items()}

    def final_hidden(self, windows: NDArray[np.int64], progress: StageProgress) -> NDArray[np.float32]:
        """Hidden states behind the last layer, float32 [windows, tokens, hidden_size]."""
        hidden = self.embed(windows)
        for index in range(self.architecture.layers):
            self.run(index, self.layer(index), hidden)
            progress(index + 1, self.architecture.layers)
        return hidden

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of rows behind the last layer: float32 [rows, hidden_size] to [rows, vocab_size]."""
        shape = self.architecture
        gain = self._checkpoint.tensor(FINAL_NORM)
        scale = np.sqrt(
            np.mean(np.square(hidden, dtype=np.float64), axis=1, keepdims=True) + shape.rms_epsilon
        )
        normed = np.asarray(hidden / scale, np.float32) * gain
        logits = np.empty((len(hidden), shape.vocab_size), np.float32)
        for start, rows in self._head():
            logits[:, start : start + len(rows)] = normed @ rows.T
        if shape.logit_softcap is not None:
            logits = np.float32(shape.logit_softcap) * np.tanh(logits / np.float32(shape.logit_softcap))
        return logits

    def _outputs(
        self, index: int, floats: FloatLayer, hidden: NDArray[np.float32]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each window's outputs by name, points by themselves."""
        shape, (count, tokens, _) = self.architecture, hidden.shape
        graph = layer_graph(shape, index, floats, tokens)
        key = (shape.attention[index], tokens)
        if key not in self._sessions:
            self._sessions[key] = _session(graph.model)
        session = self._sessions[key]
        cache = np.zeros((1, shape.kv_heads, tokens, shape.head_dim), np.float32)
        fixed = [np.zeros(1, np.int32), np.full(1, tokens, np.int32), cache, cache, *graph.weights]
        names = [item.name for item in session.get_inputs()]
        outputs = [item.name for item in session.get_outputs()]
        device = "cuda" if _CUDA in session.get_providers() else "cpu"
        kept = [ort.OrtValue.ortvalue_from_numpy(array, device, 0) for array in fixed]
        for window in range(count):
            binding = session.io_binding()
            binding.bind_cpu_input(names[0], np.ascontiguousarray(hidden[window : window + 1]))
            for name, value in zip(names[1:], kept, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            arrays = binding.copy_outputs_to_cpu()
            yield window, dict(zip(OUTPUTS, arrays, strict=True))

    def _head(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows of the head with the index of the first; kept if they are one chunk."""
        name = EMBEDDING if self.architecture.tied_embedding else HEAD
        if self._small_head is not None:
            yield 0, self._small_head
            return
        for start, rows in self._table(name):
            if len(rows) == self.architecture.vocab_size:
                self._small_head = rows
            yield start, rows

    def _table(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        ranges = row_ranges(self.architecture, name, _HEAD_CHUNK_BYTES)
        return ((start, self._checkpoint.rows(name, start, stop)) for start, stop in ranges)


class TextWalk:
    """A text on its way through a model; where it is, it keeps on disk for another run.

    The caller saves behind each layer, before it writes what it made of that layer: so for every layer that
    was written, the hidden states behind it are there.
    """

    def __init__(self, model: FloatModel, windows: NDArray[np.int64], folder: Path) -> None:
        """Keep hidden states in `folder`; `windows` is int64 [windows, tokens]."""
        self._model = model
        self._windows = windows
        self._folder = folder
        self._hidden = np.empty((0, 0, 0), np.float32)
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, layer: int) -> bool:
        """Whether the walk can begin before that layer."""
        return layer == 0 or self._path(layer).exists()

    def go_to(self, layer: int) -> None:
        """To the states before a layer: from the embedding before the first, else from the disk."""
        self._hidden = self._model.embed(self._windows) if layer == 0 else np.load(self._path(layer))

    def first_window(self) -> NDArray[np.float32]:
        """A copy of the hidden states of the first window, float32 [1, tokens, hidden_size]."""
        return np.array(self._hidden[:1])

    def observe(self, layer: int, floats: FloatLayer, *, advance: bool) -> dict[Point, InputStatistics]:
        """As `FloatModel.observe`."""
        return self._model.observe(layer, floats, self._hidden, advance=advance)

    def advance(self, layer: int, floats: FloatLayer) -> None:
        """Through a layer with these weights."""
        self._model.run(layer, floats, self._hidden)

    def save(self, layer: int) -> None:
        """The states before a layer; those before the last one stay too, all others go.

        Raises BuildError when the disk refuses; then nothing half is left, and what was saved before stays.
        """
        path = self._path(layer)
        unfinished = path.with_suffix(".part")
        try:
            with unfinished.open("wb") as file:
                np.save(file, self._hidden)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise _refused(self._folder, self._hidden.nbytes, error) from error
        for old in self._folder.glob("*.npy"):
            if old not in {path, self._path(layer - 1)}:
                old.unlink()

    def _path(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer:05d}.npy"


def _refused(folder: Path, wanted_bytes: int, error: OSError) -> BuildError:
    """Of a full disk numpy says how many values it wrote, and neither where nor why no more."""
    why = f": {error.strerror}" if error.strerror else ""
    return BuildError(
        f"{folder}: cannot save {wanted_bytes:,} bytes of hidden states{why}, "
        f"{shutil.disk_usage(folder).free:,} bytes free",
        "free some space and run it again: it goes on behind the layers that are done",
    )


class _Sums:
    """Running sums over the vectors that come by."""

    def __init__(self, width: int) -> None:
        self._tokens = 0
        self._gram = np.zeros((width, width), np.float32)
        self._abs = np.zeros(width, np.float64)
        self._max = np.zeros(width, np.float32)

    def add(self, rows: NDArray[np.float32]) -> None:
        magnitude = np.abs(rows)
        self._tokens += len(rows)
        self._gram += rows.T @ rows
        self._abs += magnitude.sum(axis=0, dtype=np.float64)
        np.maximum(self._max, magnitude.max(axis=0), out=self._max)

    def statistics(self) -> InputStatistics:
        self._gram /= np.float32(self._tokens)
        mean = np.asarray(self._abs / self._tokens, np.float32)
        return InputStatistics(self._tokens, self._gram, mean, self._max)


def _session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Arenas grow by doubling and are never given back.
    options.enable_cpu_mem_arena = False
    # Between its runs others compute: statistics, methods.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [name for name in (_CUDA, "CPUExecutionProvider") if name in ort.get_available_providers()]
    return ort.InferenceSession(model, options, providers=providers)
