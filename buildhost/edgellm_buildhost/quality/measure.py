"""Measures a finished engine against the model that it was made of: both read the same windows of a text.

Perplexity says how well each predicts the text; the divergence (KL) and the likeliest token say how far the
engine's predictions are from the model's, whatever the text has next, so they tell methods apart on a shorter
text. The engine is run by its own runtime with its own graph, cache and 8-bit activations: what is measured
is what devices run.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgellm.bundle.config import EngineConfig
from edgellm.bundle.quality import (
    CalibrationText,
    HeldOutText,
    MeasuringRuntime,
    QualityReport,
    Reference,
)
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.progress import Progress, StageProgress
from edgellm_buildhost.quality.divergence import Scores, score
from edgellm_buildhost.quality.engine import Engine

WINDOWS = 16
WINDOW_TOKENS = 256
# exp of more is no figure that says anything, nor one that JSON can carry far.
_MOST_NATS = 200.0


class FloatReference(Protocol):
    """The model in float32, run layer by layer; holds the head when asked for logits."""

    def final_hidden(self, windows: NDArray[np.int64], progress: StageProgress) -> NDArray[np.float32]:
        """Behind the last layer, before the final norm, `[windows, tokens, hidden]`; windows apart."""

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Final norm, head and soft cap over rows `[n, hidden]`: `[n, vocab]`."""


def measure(
    reference: FloatReference,
    engine_directory: Path,
    config: EngineConfig,
    windows: NDArray[np.int64],
    progress: Progress,
    *,
    text: HeldOutText,
    kind: Reference = "float",
    calibration: CalibrationText | None = None,
) -> QualityReport:
    """The report on the engine in a directory; equal arguments give equal figures, seconds apart.

    It takes the memory of a loaded engine, the hidden values of all windows, and logits of 64 tokens twice.

    Args:
        reference: What the engine is compared with.
        engine_directory: Its files.
        config: As the engine's bundle has it.
        windows: Token ids `[windows, window_tokens]`, each window a piece of the text with whatever the
            model's texts begin with.
        progress: Told layers of the reference as "reference", and tokens as "measure".
        text: What the windows are from.
        kind: What the reference is.
        calibration: What the weights were rounded for, if anything.

    Raises:
        BuildError: A window is longer than the context or has no token to predict; this ONNX Runtime is not
            one for the engine; or either computes logits that are not finite.
    """
    began_s = time.monotonic()
    _check(windows, config)
    hidden = reference.final_hidden(windows, lambda done, total: progress("reference", done, total))
    engine = Engine(engine_directory, config, windows.shape[1])
    scores = []
    for number, window in enumerate(windows):
        scores.append(_read(reference, hidden[number], engine, window))
        progress("measure", (number + 1) * windows.shape[1], windows.size)
    seconds = time.monotonic() - began_s
    return _report(scores, windows, text=text, kind=kind, calibration=calibration, seconds=seconds)


def _check(windows: NDArray[np.int64], config: EngineConfig) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise BuildError(
            f"the held-out text gives windows of shape {windows.shape}: nothing to predict",
            "give a text of at least one window",
        )
    if windows.shape[1] > config.model.context_length:
        raise BuildError(
            f"windows of {windows.shape[1]:,} tokens, and the model reads {config.model.context_length:,}",
            "measure with shorter windows",
        )
    if windows.min() < 0 or windows.max() >= config.model.vocab_size:
        raise BuildError(
            f"the held-out text has tokens that are not among the model's {config.model.vocab_size:,}",
            "check that the tokenizer is the model's",
        )


def _read(
    reference: FloatReference, hidden: NDArray[np.float32], engine: Engine, window: NDArray[np.int64]
) -> Scores:
    """Scores of all tokens of a window but its first; the engine's last prediction has none to compare."""
    parts = []
    for positions, answered in engine.read(window[:-1]):
        expected = reference.logits(hidden[positions])
        if not np.isfinite(expected).all():
            raise BuildError(
                "the float model computes logits that are not finite for the held-out text",
                "check the checkpoint: its values overflow float32, or are not numbers",
            )
        parts.append(score(expected, answered, window[1:][positions]))
    return Scores.joined(parts)


def _report(
    windows_scores: list[Scores],
    windows: NDArray[np.int64],
    *,
    text: HeldOutText,
    kind: Reference,
    calibration: CalibrationText | None,
    seconds: float,
) -> QualityReport:
    scores = Scores.joined(windows_scores)
    perplexity, before = _perplexity(scores.engine_nll), _perplexity(scores.reference_nll)
    return QualityReport(
        text=text,
        windows=windows.shape[0],
        window_tokens=windows.shape[1],
        tokens=len(scores.agree),
        reference=kind,
        perplexity=perplexity,
        float_perplexity=before,
        perplexity_increase=perplexity / before - 1,
        perplexity_increase_stderr=_stderr_of_increase(
            [part.engine_nll - part.reference_nll for part in windows_scores]
        ),
        kl_divergence=float(scores.divergence.mean()),
        kl_divergence_p99=float(np.quantile(scores.divergence, 0.99)),
        top1_agreement=float(scores.agree.mean()),
        runtime=MeasuringRuntime(name="onnxruntime", version=ort.__version__),
        calibration=calibration,
        seconds=round(seconds, 1),
    )


def _stderr_of_increase(differences: list[NDArray[np.float64]]) -> float | None:
    """Standard error of exp(mean difference) - 1, from each window's tokens: engine's nats less reference's.

    Paired by token, what makes a token hard cancels out. Windows are what was drawn from the text: tokens
    of one window are not independent of each other, so their means are what is compared.
    """
    if len(differences) < 2:
        return None
    means = np.array([window.mean() for window in differences])
    return float(np.exp(means.mean()) * means.std(ddof=1) / math.sqrt(len(means)))


def _perplexity(nll: NDArray[np.float64]) -> float:
    nats = float(nll.mean())
    if nats > _MOST_NATS:
        raise BuildError(
            f"the held-out text costs {nats:,.0f} nats a token: that is no language model",
            "check the checkpoint, and that the text is in a language that it knows",
        )
    return math.exp(nats)
