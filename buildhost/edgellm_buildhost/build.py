"""Builds an engine: a checkpoint goes in, the files and the config of an engine bundle come out."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edgellm.bundle.config import (
    EngineConfig,
    EngineFiles,
    Footprint,
    ModelShape,
    Precision,
    SpecialTokens,
    Target,
)
from edgellm_buildhost.checkpoint.base import Architecture, Checkpoint
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.graph.decoder import write_decoder
from edgellm_buildhost.graph.onnxruntime import (
    RUNTIME_REQUIRES,
    RUNTIME_REQUIRES_INT8_KV,
    OnnxRuntimeDialect,
)
from edgellm_buildhost.graph.weights import SHARD_BYTES, WeightShards
from edgellm_buildhost.recipe import RECIPES, KvName, PrecisionName, QuantizedWeights, Recipe

GRAPH_FILE = "model.onnx"
RAGGED_GRAPH_FILE = "model-ragged.onnx"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_INTEGER_ACTIVATIONS = 4
_HEAD_DIM_STEP = 16
_SESSION_BYTES = 10 * 1024 * 1024  # graph, kernels and threads of a session

Progress = Callable[[str, int, int], None]
"""Told the stage of a build, and of that stage what is done, and all."""


def build_engine(
    checkpoint: Checkpoint,
    precision: PrecisionName,
    directory: Path,
    *,
    profile: str,
    kv: KvName = KvName.FLOAT32,
    name: str | None = None,
    progress: Progress | None = None,
    accuracy_level: int = _INTEGER_ACTIVATIONS,
    shard_bytes: int = SHARD_BYTES,
    canary: bool = True,
) -> EngineConfig:
    """Write the engine's files into `directory`, which exists and is empty, and describe them.

    Equal arguments give equal bytes. Memory follows the largest matrix, not the model, until the engine runs:
    for its canary, unless `canary` is False, and for the scales of an INT8 KV cache. Then it takes the memory
    of the quantized weights. `accuracy_level` 0 multiplies in float32 instead of 8-bit integers. Raises
    BuildError for a checkpoint that cannot be built, OSError for a disk that cannot be written; what was
    written until then stays in `directory`.
    """
    architecture, recipe = checkpoint.architecture, RECIPES[precision]
    if architecture.head_dim % _HEAD_DIM_STEP:
        raise BuildError(
            f"{checkpoint.name}: head_dim {architecture.head_dim} is no multiple of {_HEAD_DIM_STEP}",
            "the attention kernel of ONNX Runtime takes no other head size: choose another model",
        )
    progress = progress or _silent
    weights = QuantizedWeights(checkpoint, recipe)
    with WeightShards(directory, shard_bytes) as shards:
        dialect = OnnxRuntimeDialect(architecture, shards, accuracy_level=accuracy_level)
        write_decoder(architecture, weights, dialect, partial(progress, "quantize"))
    ragged_graph = _write_graphs(dialect, checkpoint, directory, kv, progress)
    tokenizer = checkpoint.tokenizer
    (directory / TOKENIZER_FILE).write_bytes(tokenizer.tokenizer_json)
    if tokenizer.chat_template is not None:
        (directory / CHAT_TEMPLATE_FILE).write_bytes(tokenizer.chat_template.encode())
    config = EngineConfig(
        name=name or suggested_name(checkpoint, precision, kv),
        runtime="onnxruntime",
        runtime_requires=RUNTIME_REQUIRES_INT8_KV if kv is KvName.INT8 else RUNTIME_REQUIRES,
        target=Target(profile=profile),
        model=_model_shape(architecture),
        precision=_precision(precision, recipe, weights.table_group_size, accuracy_level, kv),
        tokens=SpecialTokens(bos_id=tokenizer.bos_id, add_bos=tokenizer.add_bos, eos_ids=tokenizer.eos_ids),
        footprint=_footprint(architecture, dialect.loaded_bytes),
        files=EngineFiles(
            graph=GRAPH_FILE,
            graph_ragged=ragged_graph,
            tokenizer=TOKENIZER_FILE,
            chat_template=CHAT_TEMPLATE_FILE if tokenizer.chat_template is not None else None,
        ),
    )
    return _with_canary(config, directory, progress) if canary else config


def _with_canary(config: EngineConfig, directory: Path, progress: Progress) -> EngineConfig:
    """The config with what the finished engine answers."""
    # Brings ONNX Runtime, which reading and quantizing do without.
    from edgellm_buildhost.canary import record_canary  # noqa: PLC0415

    return config.model_copy(update={"canary": record_canary(directory, config, partial(progress, "canary"))})


def _write_graphs(
    dialect: OnnxRuntimeDialect, checkpoint: Checkpoint, directory: Path, kv: KvName, progress: Progress
) -> str:
    """Write the graphs over one set of shards; title of the one for rows of different lengths.

    With an INT8 cache there is but one: the portable graph serves the calibration and is replaced.
    """
    dialect.save(directory / GRAPH_FILE)
    dialect.accept_ragged_rows()
    if kv is KvName.FLOAT32:
        dialect.save(directory / RAGGED_GRAPH_FILE)
        return RAGGED_GRAPH_FILE
    # Brings ONNX Runtime, which reading and quantizing do without.
    from edgellm_buildhost.calibration import calibrate, default_text  # noqa: PLC0415

    calibrating = partial(progress, "calibrate")
    dialect.store_cache_as_int8(calibrate(directory / GRAPH_FILE, checkpoint, default_text(), calibrating))
    dialect.save(directory / GRAPH_FILE)
    return GRAPH_FILE


def _silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""
    del stage, done, total


def suggested_name(checkpoint: Checkpoint, precision: PrecisionName, kv: KvName = KvName.FLOAT32) -> str:
    """A name for the engine, as in `smollm2-135m-instruct-int4` or `...-int4-kv-int8`."""
    stem = re.sub(r"[.-](q\d\w*|iq\d\w*|b?f16|f32)$", "", checkpoint.name, flags=re.IGNORECASE)
    plain = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")
    cache = "" if kv is KvName.FLOAT32 else f"-kv-{kv.value}"
    return f"{plain[:100] or 'engine'}-{precision.value}{cache}"


def _model_shape(architecture: Architecture) -> ModelShape:
    return ModelShape(
        architecture=architecture.family,
        layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=architecture.ffn_size,
        vocab_size=architecture.vocab_size,
        context_length=architecture.context_length,
    )


def _precision(
    precision: PrecisionName, recipe: Recipe, table_group_size: int, accuracy_level: int, kv: KvName
) -> Precision:
    table = f"int8, symmetric, groups of {table_group_size}"
    integer = accuracy_level == _INTEGER_ACTIVATIONS
    return Precision(
        weights=precision.value,
        group_size=recipe.group_size,
        scheme=recipe.scheme,
        embedding=table,
        head=table,
        activations="float32, rounded to int8 inside a product" if integer else "float32",
        kv=kv.value,
    )


def _footprint(architecture: Architecture, loaded_bytes: int) -> Footprint:
    """Memory of the engine in ONNX Runtime, as measured on 1.23 and 1.32 with x86-64 kernels.

    The live activations of a token at the widest point of a layer are gate and up (twice: packed, and
    split), their product and its 8-bit copy; the allocator grows by doubling, so twice of that is taken.
    """
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    live = 5 * ffn + 4 * hidden + architecture.query_size + 2 * architecture.kv_size
    return Footprint(
        weights_bytes=loaded_bytes,
        workspace_base_bytes=_SESSION_BYTES,
        workspace_bytes_per_token=2 * 4 * live,
    )
