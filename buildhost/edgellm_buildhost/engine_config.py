"""What an engine says of itself, be it built or only planned."""

from __future__ import annotations

from typing import Literal

from edgellm.bundle.config import (
    EngineConfig,
    EngineFiles,
    Footprint,
    ModelShape,
    Precision,
    SpecialTokens,
    Target,
)
from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.graph.onnxruntime import RUNTIME_REQUIRES, RUNTIME_REQUIRES_INT8_KV
from edgellm_buildhost.graph.sources import table_group_size
from edgellm_buildhost.recipe import KvName

GRAPH_FILE = "model.onnx"
RAGGED_GRAPH_FILE = "model-ragged.onnx"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ROUNDED_ACTIVATIONS = "float32, rounded to int8 inside a product"
_SESSION_BYTES = 10 * 1024 * 1024  # graph, kernels and threads of a session


def runtime_requires(kv: KvName) -> str:
    """The versions of ONNX Runtime that run an engine with such a cache."""
    return RUNTIME_REQUIRES_INT8_KV if kv is KvName.INT8 else RUNTIME_REQUIRES


def engine_config(
    architecture: Architecture,
    kv: KvName,
    *,
    name: str,
    profile: str,
    precision: Precision,
    tokens: SpecialTokens,
    loaded_bytes: int,
    chat_template: bool,
) -> EngineConfig:
    """What an engine says of itself; `loaded_bytes` are those of its weights, when they are loaded."""
    int8 = kv is KvName.INT8
    return EngineConfig(
        name=name,
        runtime="onnxruntime",
        runtime_requires=runtime_requires(kv),
        target=Target(profile=profile),
        model=_model_shape(architecture),
        precision=precision,
        tokens=tokens,
        footprint=_footprint(architecture, loaded_bytes),
        files=EngineFiles(
            graph=GRAPH_FILE,
            graph_ragged=GRAPH_FILE if int8 else RAGGED_GRAPH_FILE,
            tokenizer=TOKENIZER_FILE,
            chat_template=CHAT_TEMPLATE_FILE if chat_template else None,
        ),
    )


def engine_precision(
    architecture: Architecture,
    kv: KvName,
    *,
    weights: Literal["int4", "int8", "mixed"],
    group_size: int | None,
    scheme: str,
    activations: str = ROUNDED_ACTIVATIONS,
) -> Precision:
    """How an engine keeps its numbers; what is given is about its linears."""
    table = f"int8, symmetric, groups of {table_group_size(architecture)}"
    return Precision(
        weights=weights,
        group_size=group_size,
        scheme=scheme,
        embedding=table,
        head=table,
        activations=activations,
        kv=kv.value,
    )


def special_tokens(tokenizer: TokenizerFiles) -> SpecialTokens:
    """The ids that a device needs beside the tokenizer's file."""
    return SpecialTokens(bos_id=tokenizer.bos_id, add_bos=tokenizer.add_bos, eos_ids=tokenizer.eos_ids)


def _model_shape(architecture: Architecture) -> ModelShape:
    """The figures that a device plans with."""
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
