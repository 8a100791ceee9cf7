"""Builds an engine: a checkpoint goes in, the files and the config of an engine bundle come out.

float checkpoint ──quantize──▶ quantized checkpoint ──compile──▶ engine files ──canary──▶ config
"""

from __future__ import annotations

import re
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.bundle.config import EngineConfig
from edgellm_buildhost.calibration.text import Text, calibration_text, windows
from edgellm_buildhost.canary import record_canary
from edgellm_buildhost.checkpoint.base import Checkpoint
from edgellm_buildhost.compile import INTEGER_ACTIVATIONS, check_buildable, compile_engine
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.weights import SHARD_BYTES
from edgellm_buildhost.progress import Progress, silent
from edgellm_buildhost.quantize import Quantization
from edgellm_buildhost.quantized.base import QuantizedCheckpoint
from edgellm_buildhost.quantized.open import open_quantized
from edgellm_buildhost.recipe import KvName, QuantName, Request, recipe_for

WINDOWS, WINDOW_TOKENS = 16, 512
"""How much of a text calibrates: 8,192 tokens."""


def build_engine(
    source: Checkpoint | QuantizedCheckpoint,
    quant: Request | QuantName | None,
    directory: Path,
    *,
    profile: str,
    kv: KvName = KvName.FLOAT32,
    name: str | None = None,
    text: Text | None = None,
    work: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
    accuracy_level: int = INTEGER_ACTIVATIONS,
    shard_bytes: int = SHARD_BYTES,
    canary: bool = True,
) -> EngineConfig:
    """Write the engine's files into `directory`, which exists and is empty, and describe them.

    Equal arguments give equal bytes. A source that is quantized already is compiled as it is. Memory follows
    one layer, until the engine runs: for its canary, unless `canary` is False, and for the scales of an INT8
    KV cache. Then it takes the memory of the quantized weights.

    Args:
        source: What to build from.
        quant: How to round the linears; None for a source that is quantized already.
        directory: Where the engine's files go.
        profile: The kind of board that it is for.
        kv: How the engine keeps keys and values.
        name: Of the engine; None takes the checkpoint's.
        text: For calibration; None takes `calibration_text`.
        work: Where the quantized checkpoint is made, and found again by a run with the same `key`; None makes
            it in a temporary directory.
        key: Names the source, the request and the text.
        progress: Told the stages.
        accuracy_level: 0 multiplies in float32 instead of 8-bit integers.
        shard_bytes: Most bytes of a weight file.
        canary: Whether the finished engine answers once.

    Raises:
        BuildError: The checkpoint cannot be built as asked.
        ValueError: Exactly one of `quant` and a quantized source is wanted.
        OSError: A disk cannot be written.
    """
    progress = progress or silent
    request = Request(quant) if isinstance(quant, QuantName) else quant
    check_buildable(source.architecture, source.name)
    with tempfile.TemporaryDirectory(prefix=".quantized.", dir=work or directory.parent) as temporary:
        read = None
        if kv is KvName.INT8 or recipe_calibrates(source, request):
            read = calibration_windows(source, text)
        if isinstance(source, Checkpoint) and request is not None:
            target = (work or Path(temporary)) / "checkpoint"
            quantized = quantize(source, request, target, key=key, windows=read, progress=progress)
        elif isinstance(source, QuantizedCheckpoint) and request is None:
            quantized = source
        else:
            raise ValueError("exactly one of quant and a quantized source is wanted")
        config = compile_engine(
            quantized,
            directory,
            name=name or suggested_name(source.name, request.quant if request else None, kv),
            profile=profile,
            kv=kv,
            windows=read,
            accuracy_level=accuracy_level,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    return _with_canary(config, directory, progress) if canary else config


def quantize(
    checkpoint: Checkpoint,
    request: Request,
    target: Path,
    *,
    key: str,
    windows: NDArray[np.int64] | None,
    progress: Progress,
) -> QuantizedCheckpoint:
    """The quantized checkpoint in the directory `target`, made there unless a run before has finished it."""
    recipe = recipe_for(request, checkpoint.architecture)
    if not target.exists():
        Quantization(checkpoint, recipe, key, windows).write(target, progress)
    return open_quantized(target)


def recipe_calibrates(source: Checkpoint | QuantizedCheckpoint, request: Request | None) -> bool:
    """Whether the weights are rounded for a text."""
    return request is not None and recipe_for(request, source.architecture).method.needs_statistics


def calibration_windows(source: Checkpoint | QuantizedCheckpoint, text: Text | None) -> NDArray[np.int64]:
    """What calibrates, int64 [windows, tokens]; raises BuildError as `text_windows` does."""
    return text_windows(source, text or calibration_text(), WINDOWS, WINDOW_TOKENS)


def text_windows(
    source: Checkpoint | QuantizedCheckpoint, text: Text, count: int, tokens: int
) -> NDArray[np.int64]:
    """Windows of at most `tokens` tokens, int64 [windows, tokens].

    Raises BuildError for a text shorter than one window, and for tokens that the model does not have.
    """
    architecture = source.architecture
    found = windows(source.tokenizer, text, count, min(tokens, architecture.context_length))
    if found.max() >= architecture.vocab_size:
        raise BuildError(
            f"{text.name}: the tokenizer gives token {found.max()}, the model has {architecture.vocab_size}",
            "use the tokenizer.json that belongs to the checkpoint",
        )
    return found


def suggested_name(source: str, quant: QuantName | None, kv: KvName = KvName.FLOAT32) -> str:
    """A name for the engine, as in `smollm2-135m-instruct-int4` or `...-int4-kv-int8`.

    The name of a source that was quantized by others says how, or nobody knows it.
    """
    stem = re.sub(r"[.-](q\d\w*|iq\d\w*|b?f16|f32)$", "", source, flags=re.IGNORECASE)
    plain = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")
    cache = "" if kv is KvName.FLOAT32 else f"-kv-{kv.value}"
    method = "" if quant is None else f"-{quant.value}"
    return f"{plain[:100] or 'engine'}{method}{cache}"


def _with_canary(config: EngineConfig, directory: Path, progress: Progress) -> EngineConfig:
    """The config with what the finished engine answers."""
    return config.model_copy(update={"canary": record_canary(directory, config, partial(progress, "canary"))})
