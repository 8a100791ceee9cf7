"""Quantizes a checkpoint, layer by layer, into a directory that every runtime's compiler reads.

What an interrupted run finished is kept, and a run with the same key goes on behind it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.calibration.walk import FloatModel, TextWalk
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.progress import Progress
from edgellm_buildhost.quantization.layer import Method, QuantizedLayer
from edgellm_buildhost.quantized.writer import CheckpointWriter
from edgellm_buildhost.recipe import Recipe
from edgellm_buildhost.survey import Survey
from edgellm_buildhost.threads import limited_for


@dataclass(frozen=True)
class Quantization:
    """What is quantized, how, and on which text.

    `key` names source, recipe and text: what a run with another key left unfinished is dropped. `windows`,
    int64 [windows, tokens], is the calibration text; a method that needs none ignores it.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    key: str
    windows: NDArray[np.int64] | None = None

    def write(self, target: Path, progress: Progress) -> None:
        """Write the quantized checkpoint to the directory `target`.

        Memory: the floats of a layer and what the method needs for one. Raises BuildError, OSError; what was
        finished until then stays beside `target`, hidden, for the next run, unless the source is at fault.
        """
        folder = target.with_name(f"{_calibration(target)}{self.key[:16]}")
        with (
            limited_for(self.checkpoint.architecture.hidden_size),
            CheckpointWriter(target, self.checkpoint, key=self.key, scheme=self.recipe.scheme) as writer,
        ):
            _forget_others(target, folder)
            try:
                if writer.done < self.checkpoint.architecture.layers:
                    self._add_layers(writer, folder, progress)
                shutil.rmtree(folder, ignore_errors=True)
                writer.finish()
            except BuildError as error:
                # What is wrong with the source is wrong again; a disk that was full may have room next time.
                if not isinstance(error.__cause__, OSError):
                    shutil.rmtree(folder, ignore_errors=True)
                    writer.discard()
                raise

    def _add_layers(self, writer: CheckpointWriter, folder: Path, progress: Progress) -> None:
        count = self.checkpoint.architecture.layers
        layers = self._layers(folder, progress)
        layers.go_to(writer.done)
        progress("quantize", writer.done, count)
        for layer in range(writer.done, count):
            writer.add_layer(layer, layers.quantize(layer))
            progress("quantize", layer + 1, count)

    def _layers(self, folder: Path, progress: Progress) -> _Layers:
        model, method = FloatModel(self.checkpoint), self.recipe.method
        if not method.needs_statistics:
            return _Layers(model, method)
        if self.windows is None:
            raise ValueError("the method needs windows of a text")
        if self.recipe.mixture is not None:
            method = Survey(model, self.recipe.mixture, self.windows, folder / "survey").method(progress)
        return _CalibratedLayers(model, method, TextWalk(model, self.windows, folder / "walk"))


def _calibration(target: Path) -> str:
    """How the names of folders begin in which the walk through a text is kept."""
    return f".{target.name}.calibration-"


def _forget_others(target: Path, folder: Path) -> None:
    """The writer has dropped the layers of another key; so goes what belongs to them."""
    for other in target.parent.iterdir():
        if other.name.startswith(_calibration(target)) and other != folder:
            shutil.rmtree(other, ignore_errors=True)


class _Layers:
    """Layers, quantized one after the other."""

    def __init__(self, model: FloatModel, method: Method) -> None:
        self._model = model
        self._method = method

    def go_to(self, layer: int) -> None:
        """Begin before that layer."""

    def quantize(self, layer: int) -> QuantizedLayer:
        """The layer, quantized."""
        return self._method.quantize(self._model.architecture, layer, self._model.layer(layer), None)


class _CalibratedLayers(_Layers):
    """With what a text shows of their inputs."""

    def __init__(self, model: FloatModel, method: Method, walk: TextWalk) -> None:
        super().__init__(model, method)
        self._walk = walk

    def go_to(self, layer: int) -> None:
        """The text is read up to there."""
        if not self._walk.has(layer):
            raise BuildError(
                f"what an interrupted run left behind layer {layer} is not complete",
                "run it again: it begins anew",
            )
        self._walk.go_to(layer)

    def quantize(self, layer: int) -> QuantizedLayer:
        """The layer, quantized; the text is behind it then."""
        floats = self._model.layer(layer)
        statistics = self._walk.observe(layer, floats, advance=not self._method.sequential)
        quantized = self._method.quantize(self._model.architecture, layer, floats, statistics)
        del floats, statistics
        if self._method.sequential:
            self._walk.advance(layer, quantized.dequantize())
        self._walk.save(layer + 1)
        return quantized
