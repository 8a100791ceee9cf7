"""Compiles a quantized checkpoint for ONNX Runtime: graphs, weight shards and tokenizer, and their config."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgellm.bundle.config import EngineConfig, Precision
from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.calibration.kv import calibrate
from edgellm_buildhost.engine_config import (
    CHAT_TEMPLATE_FILE,
    GRAPH_FILE,
    RAGGED_GRAPH_FILE,
    ROUNDED_ACTIVATIONS,
    TOKENIZER_FILE,
    engine_config,
    engine_precision,
    special_tokens,
)
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.decoder import write_decoder
from edgellm_buildhost.graph.onnxruntime import OnnxRuntimeDialect
from edgellm_buildhost.graph.sources import QuantizedWeights, table_group_size
from edgellm_buildhost.graph.weights import SHARD_BYTES, WeightShards
from edgellm_buildhost.progress import Progress
from edgellm_buildhost.quantization.grid import QuantizedTensor
from edgellm_buildhost.quantization.layer import Fp8Tensor, Int8Tensor, Linear
from edgellm_buildhost.quantized.base import QuantizedCheckpoint
from edgellm_buildhost.recipe import KvName

INTEGER_ACTIVATIONS = 4
_HEAD_DIM_STEP = 16


def compile_engine(
    checkpoint: QuantizedCheckpoint,
    directory: Path,
    *,
    name: str,
    profile: str,
    kv: KvName = KvName.FLOAT32,
    windows: NDArray[np.int64] | None = None,
    accuracy_level: int = INTEGER_ACTIVATIONS,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress,
) -> EngineConfig:
    """Write the engine's files into `directory`, which exists and is empty, and describe them.

    Equal arguments give equal bytes. An INT8 KV cache takes its scales from `windows`, int64 [windows,
    tokens].
    `accuracy_level` 0 multiplies weight-only linears in float32 instead of 8-bit integers. Raises BuildError,
    OSError; what was written until then stays in `directory`.
    """
    architecture = checkpoint.architecture
    check_buildable(architecture, checkpoint.name)
    weights = _Seen(QuantizedWeights(checkpoint))
    with WeightShards(directory, shard_bytes) as shards:
        dialect = OnnxRuntimeDialect(architecture, shards, accuracy_level=accuracy_level)
        write_decoder(architecture, weights, dialect, partial(progress, "compile"))
    _write_graphs(dialect, checkpoint, directory, kv=kv, windows=windows, progress=progress)
    tokenizer = checkpoint.tokenizer
    (directory / TOKENIZER_FILE).write_bytes(tokenizer.tokenizer_json)
    if tokenizer.chat_template is not None:
        (directory / CHAT_TEMPLATE_FILE).write_bytes(tokenizer.chat_template.encode())
    return engine_config(
        architecture,
        kv,
        name=name,
        profile=profile,
        precision=weights.precision(checkpoint, accuracy_level, kv),
        tokens=special_tokens(tokenizer),
        loaded_bytes=dialect.loaded_bytes,
        chat_template=tokenizer.chat_template is not None,
    )


def check_buildable(architecture: Architecture, name: str) -> None:
    """Raises BuildError for a shape that the runtime's kernels do not take."""
    if architecture.head_dim % _HEAD_DIM_STEP:
        raise BuildError(
            f"{name}: head_dim {architecture.head_dim} is no multiple of {_HEAD_DIM_STEP}",
            "the attention kernel of ONNX Runtime takes no other head size: choose another model",
        )
    table_group_size(architecture)


class _Seen:
    """Hands weights out, and remembers the forms of the linears: the config says what they are."""

    def __init__(self, weights: QuantizedWeights) -> None:
        self._weights = weights
        self._bits: set[int] = set()
        self._group_sizes: set[int | None] = set()

    def linear(self, layer: int, part: str) -> Linear:
        linear = self._weights.linear(layer, part)
        if isinstance(linear, QuantizedTensor):
            self._bits.add(linear.bits)
            self._group_sizes.add(linear.group_size)
        elif isinstance(linear, Int8Tensor):
            self._bits.add(8)
            self._group_sizes.add(None)
        else:
            form = "FP8" if isinstance(linear, Fp8Tensor) else "floats"
            raise BuildError(
                f"layer {layer}: {part} is in {form}, which ONNX Runtime does not multiply by",
                "build from the float checkpoint: `edgellm build` quantizes it to 4 or 8 bits",
            )
        return linear

    def vector(self, name: str) -> NDArray[np.float32]:
        return self._weights.vector(name)

    def table(self, name: str) -> QuantizedTensor:
        return self._weights.table(name)

    def precision(self, checkpoint: QuantizedCheckpoint, accuracy_level: int, kv: KvName) -> Precision:
        activations = ROUNDED_ACTIVATIONS if accuracy_level == INTEGER_ACTIVATIONS else "float32"
        if None in self._group_sizes:
            activations = "int8, one scale a product"
        return engine_precision(
            checkpoint.architecture,
            kv,
            weights="mixed" if len(self._bits) > 1 else "int4" if self._bits == {4} else "int8",
            group_size=self._group_sizes.pop() if len(self._group_sizes) == 1 else None,
            scheme=checkpoint.scheme,
            activations=activations,
        )


def _write_graphs(
    dialect: OnnxRuntimeDialect,
    checkpoint: QuantizedCheckpoint,
    directory: Path,
    *,
    kv: KvName,
    windows: NDArray[np.int64] | None,
    progress: Progress,
) -> None:
    """Write the graphs over one set of shards.

    With an INT8 cache there is but one: the portable graph serves the calibration and is replaced.
    """
    dialect.save(directory / GRAPH_FILE)
    dialect.accept_ragged_rows()
    if kv is KvName.FLOAT32:
        dialect.save(directory / RAGGED_GRAPH_FILE)
        return
    if windows is None:
        raise ValueError("an INT8 cache needs windows of a text")
    scales = calibrate(
        directory / GRAPH_FILE,
        checkpoint.architecture,
        windows,
        partial(progress, "KV cache"),
        first=checkpoint.tokenizer.bos_id,
    )
    dialect.store_cache_as_int8(scales)
    dialect.save(directory / GRAPH_FILE)
