"""Reads windows with a finished engine, as a device does: in chunks, one window at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgellm.bundle.config import EngineConfig
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.runner import Runner, runs_here

CHUNK_TOKENS = 64


def check_runs_here(requires: str) -> None:
    """Raises BuildError if engines that need such an ONNX Runtime cannot be measured here."""
    if not runs_here(requires):
        raise BuildError(
            f"the engine needs ONNX Runtime {requires}, {ort.__version__} is installed",
            "install such a version to measure it, or build without a quality report",
        )


class Engine:
    """A loaded engine; takes its memory, and that of a chunk's logits."""

    def __init__(self, directory: Path, config: EngineConfig, window_tokens: int) -> None:
        """Load it; raises BuildError if another version of ONNX Runtime is needed."""
        check_runs_here(config.runtime_requires)
        self._runner = Runner(directory / config.files.graph, window_tokens)
        self._logits = np.empty((CHUNK_TOKENS, config.model.vocab_size), np.float32)

    def read(self, window: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Reads a window from its start: which positions, and their logits `[positions, vocab]`, in order.

        The array is overwritten by the next chunk. Raises BuildError for logits that are not finite.
        """
        for start in range(0, len(window), CHUNK_TOKENS):
            chunk = window[start : start + CHUNK_TOKENS]
            logits = self._logits[: len(chunk)]
            # What the caches hold of the window before is overwritten, or lies behind what is read.
            self._runner.feed(chunk[None], start, logits)
            if not np.isfinite(logits).all():
                raise BuildError(
                    "the finished engine computes logits that are not finite for the held-out text",
                    "check the checkpoint: its values overflow float32",
                )
            yield slice(start, start + len(chunk)), logits
