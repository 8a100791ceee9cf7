"""The canary: a finished engine answers a short prompt here, and a device's answer is compared with that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgellm.bundle.config import Canary, EngineConfig
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.progress import StageProgress
from edgellm_buildhost.runner import Runner, runs_here

# Models know how it goes on, so their largest logit is far from the next: SmolLM2-135M by 1.6 and more.
PROMPT = "1, 2, 3, 4, 5, 6, 7, 8,"
TOKENS = 16
# How far kernels may move the gap between the two largest logits. Where activations or the cache are rounded
# to 8 bits, the order of additions becomes a rounding step. SmolLM2-135M, 384 tokens of prose and of numbers,
# fed at once and one by one (AVX-512 VNNI, ONNX Runtime 1.32): single logits moved by up to 2.3, the gap by
# up to 0.83 (p99 0.60), and the likeliest token changed at gaps of up to 0.54. Float32 moved no logit by more
# than 0.0005. Numbers of threads and the graph for ragged rows moved nothing.
ROUNDED_TOLERANCE = 1.0
FLOAT_TOLERANCE = 0.01
# A gap this near to the tolerance is not recorded: it could lie on the other side at the next build.
_EDGE = 0.2
# Gaps are rounded to this part of the tolerance.
_GRAIN = 0.1


def record_canary(directory: Path, config: EngineConfig, progress: StageProgress) -> Canary | None:
    """What the engine in `directory` answers, greedily, to a fixed prompt; equal engines give equal canaries.

    None if the ONNX Runtime that is installed here is not one for this engine, the model's context is too
    short, or the very first gap is at the tolerance's edge. It takes the memory of a loaded engine.
    `progress` is told tokens done, and all. Raises BuildError if a logit is not finite.
    """
    if not runs_here(config.runtime_requires):
        return None
    prompt = _encode(directory, config)
    count = min(TOKENS, config.model.context_length - len(prompt))
    if count < 1:
        return None
    tolerance = _tolerance(config)
    engine = Runner(directory / config.files.graph, len(prompt) + count)
    logits = np.empty((1, config.model.vocab_size), np.float32)
    tokens, gaps, fed, past = [], [], prompt, 0
    for done in range(count):
        engine.feed(np.array([fed], np.int64), past, logits)
        token, gap = _choose(logits[0])
        if abs(gap - tolerance) <= _EDGE * tolerance:
            break
        tokens.append(token)
        gaps.append(_rounded(gap, _GRAIN * tolerance))
        fed, past = [token], past + len(fed)
        progress(done + 1, count)
    if not tokens:
        return None
    return Canary(prompt=PROMPT, token_ids=tuple(tokens), gaps=tuple(gaps), tolerance=tolerance)


def _encode(directory: Path, config: EngineConfig) -> list[int]:
    """The prompt's tokens, as a device makes them of a prompt without a chat template."""
    tokenizer = Tokenizer.from_file(str(directory / config.files.tokenizer))
    ids: list[int] = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    bos = config.tokens.bos_id
    return [bos, *ids] if config.tokens.add_bos and bos is not None and ids[:1] != [bos] else ids


def _tolerance(config: EngineConfig) -> float:
    rounds = "int8" in config.precision.activations or config.precision.kv == "int8"
    return ROUNDED_TOLERANCE if rounds else FLOAT_TOLERANCE


def _choose(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The likeliest token, and how far its logit is above the next."""
    if not np.isfinite(logits).all():
        raise BuildError(
            f"the finished engine computes logits that are not finite for the prompt {PROMPT!r}",
            "check the checkpoint: its values overflow float32",
        )
    token = int(logits.argmax())
    return token, float(logits[token] - np.delete(logits, token).max())


def _rounded(gap: float, grain: float) -> float:
    return round(round(gap / grain) * grain, 6)
