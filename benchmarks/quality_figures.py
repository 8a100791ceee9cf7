"""How far a quantized model is from its float model, token by token on one text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.graph_model import GraphModel, Logits

if TYPE_CHECKING:
    from typing_extensions import Self

Windows = NDArray[np.int64]
_ROWS = 16  # of 50,000 logits each: what is worked on at once stays in the processor's cache
_ERRORS = 1.96  # standard errors on each side of a mean that hold it 95 times in 100


@dataclass(frozen=True)
class Figures:
    """Of all tokens that have a next one.

    `kl_mean` and `kl_p99` are of the divergence KL(float || quantized), nats; `kl_error` is half of the 95 %
    interval of the mean. `top1` is the share of tokens for which both models have the same first choice.
    """

    tokens: int
    perplexity: float
    kl_mean: float
    kl_error: float
    kl_p99: float
    top1: float


@dataclass(frozen=True)
class _Tokens:
    """For each token: what the next one costs, the divergence, and whether the first choices agree."""

    loss: NDArray[np.float64]
    divergence: NDArray[np.float64]
    agrees: NDArray[np.bool_]


class Reference:
    """The float model's log-probabilities for all windows, in a file of `path`; close() removes it."""

    def __init__(self, path: Path, model: GraphModel, windows: Windows) -> None:
        """Have `model` read the windows."""
        self._path = path
        self._windows = windows
        rows = 0
        with path.open("wb") as file:
            for logits in _read(model, windows):
                for part in _parts(logits):
                    file.write(_log_softmax(part).tobytes())
                rows += len(logits)
        vocab = path.stat().st_size // (4 * rows)
        self._log_probabilities = np.memmap(path, np.float32, "r", shape=(rows, vocab))

    def compare(self, model: GraphModel) -> Figures:
        """The figures of a model that reads the same windows."""
        found: list[_Tokens] = []
        length = self._windows.shape[1]
        for number, logits in enumerate(_read(model, self._windows)):
            expected = self._log_probabilities[number * length : (number + 1) * length]
            found.append(_compare(expected[:-1], logits[:-1], self._windows[number, 1:]))
        loss, divergence, agrees = (
            np.concatenate([getattr(tokens, name) for tokens in found])
            for name in ("loss", "divergence", "agrees")
        )
        return Figures(
            tokens=len(loss),
            perplexity=float(np.exp(loss.mean())),
            kl_mean=float(divergence.mean()),
            kl_error=float(_ERRORS * divergence.std() / np.sqrt(len(divergence))),
            kl_p99=float(np.quantile(divergence, 0.99)),
            top1=float(agrees.mean()),
        )

    def close(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()


def _read(model: GraphModel, windows: Windows) -> Iterator[Logits]:
    for window in windows:
        model.clear()
        yield model.prefill(0, window.tolist(), 0, every=True)


def _compare(expected: NDArray[np.float32], logits: Logits, wanted: NDArray[np.int64]) -> _Tokens:
    """Rows of the float model's log-probabilities and of the other's logits, and the tokens that follow."""
    loss, divergence, agrees = [], [], []
    for start in range(0, len(logits), _ROWS):
        part = slice(start, start + _ROWS)
        theirs, ours = expected[part], _log_softmax(logits[part])
        loss.append(-ours[np.arange(len(ours)), wanted[part]].astype(np.float64))
        divergence.append((np.exp(theirs) * (theirs - ours)).sum(axis=1, dtype=np.float64))
        agrees.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
    return _Tokens(np.concatenate(loss), np.concatenate(divergence), np.concatenate(agrees))


def _log_softmax(logits: Logits) -> Logits:
    """In float32 but for the sum, which has 50,000 terms; a divergence is then exact to 1e-6."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total).astype(np.float32), np.float32)


def _parts(logits: Logits) -> Iterator[Logits]:
    for start in range(0, len(logits), _ROWS):
        yield logits[start : start + _ROWS]
