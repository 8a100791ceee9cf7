"""onnxruntime-genai's model, a token at a time: for its perplexity."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# genai finds the library of the onnxruntime that is loaded already.
import onnxruntime  # noqa: F401
import onnxruntime_genai as og  # type: ignore[import-not-found, unused-ignore]

from benchmarks.graph_model import CONTEXT_TOKENS, Logits
from benchmarks.machine import usable_cores


def load_model(path: Path, context_tokens: int, sequences: int) -> og.Model:
    """A model folder, with a thread for each core."""
    config = og.Config(str(path))
    settings = {
        "model": {"decoder": {"session_options": {"intra_op_num_threads": usable_cores()}}},
        "search": {"max_length": context_tokens},
        "engine": {"static_batching": {"max_batch_size": sequences}},
    }
    config.overlay(json.dumps(settings))
    return og.Model(config)


def genai_perplexity(path: Path, text: Sequence[int]) -> float:
    """Of the text as one sequence."""
    generator = _Generator(path)
    loss = 0.0
    for token, wanted in itertools.pairwise(text):
        logits = generator.step(token).astype(np.float64)
        logits -= logits.max()
        loss += float(np.log(np.exp(logits).sum()) - logits[wanted])
    return float(np.exp(loss / (len(text) - 1)))


class _Generator:
    def __init__(self, path: Path) -> None:
        model = load_model(path, CONTEXT_TOKENS, 1)
        self._generator = og.Generator(model, og.GeneratorParams(model))

    def step(self, token: int) -> Logits:
        """Appends a token; the logits of the next, [vocab]."""
        self._generator.append_tokens(np.array([token], np.int32))
        return np.asarray(self._generator.get_logits(), np.float32).reshape(-1)
