"""The engine config: what a bundle says about the engine inside it.

It is the `config` blob of the OCI manifest, so its bytes are part of the engine's digest; it holds only what
decides how the engine runs. What was measured or said about an engine is attached to the manifest from
outside.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

RuntimeName = Literal["onnxruntime", "tensorrt", "tensorrt_edgellm", "tensorrt_llm"]
KvDtype = Literal["float32", "float16", "int8"]
FileTitle = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Positive = Annotated[int, Field(gt=0)]

_KV_ITEM_BYTES: dict[KvDtype, int] = {"float32": 4, "float16": 2, "int8": 1}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(_Part):
    """Where the engine may run: an architecture ("any" where the files do not depend on it) or a GPU's SM,
    and a profile.
    """

    architecture: Literal["any", "amd64", "arm64"] = "any"
    sm: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    profile: str


class ModelShape(_Part):
    """The figures of a decoder that memory and speed follow from."""

    architecture: str
    layers: Positive
    hidden_size: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    ffn_size: Positive
    vocab_size: Positive
    context_length: Positive


class Precision(_Part):
    """How each kind of tensor is stored, in words that a person can compare."""

    weights: Literal["int4", "int8", "mixed"]
    group_size: Positive | None = Field(
        description="weights that share a scale; None: a row, or several sizes"
    )
    scheme: str = Field(description="for example 'asymmetric, float minimum per group'")
    embedding: str
    head: str
    activations: str
    kv: KvDtype = "float32"


class SpecialTokens(_Part):
    """Token ids that begin and end a text."""

    bos_id: int | None = None
    add_bos: bool = False
    eos_ids: tuple[int, ...]


class Footprint(_Part):
    """Memory of the loaded engine, KV cache apart.

    The workspace of a step is `workspace_base_bytes + tokens * workspace_bytes_per_token`, and the attention
    scores on top: heads * tokens * context * 4 bytes.
    """

    weights_bytes: Positive
    workspace_base_bytes: Annotated[int, Field(ge=0)]
    workspace_bytes_per_token: Annotated[int, Field(ge=0)]


class EngineFiles(_Part):
    """Titles of the files that the runtime opens by name; weight shards are named by the graphs themselves.

    `graph` runs on every version that the engine allows. `graph_ragged` is the same for those versions that
    take rows of different lengths in one step, and may be the same file.
    """

    graph: FileTitle
    graph_ragged: FileTitle | None = None
    tokenizer: FileTitle
    chat_template: FileTitle | None = None


class Canary(_Part):
    """What the engine answered to a short prompt where it was built, one likeliest token after the other.

    Another processor adds in another order, which may move a gap by the tolerance. So its answer may leave
    this one, for the first time, only at a step whose gap is below that; after it they are two texts.
    """

    prompt: str = Field(min_length=1, max_length=256)
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=64)
    gaps: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        description="for each token: its logit less the next largest one, rounded"
    )
    tolerance: float = Field(
        gt=0, allow_inf_nan=False, description="how far kernels may move such a gap, logits"
    )

    @model_validator(mode="after")
    def _of_one_length(self) -> Canary:
        if len(self.gaps) != len(self.token_ids):
            raise ValueError(f"{len(self.token_ids)} token_ids need as many gaps, not {len(self.gaps)}")
        return self


class EngineConfig(_Part):
    """The typed config blob of an engine manifest."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")
    runtime: RuntimeName
    runtime_requires: str = Field(
        description="version specifier of the runtime (PEP 440), for example '>=1.23'"
    )
    target: Target
    model: ModelShape
    precision: Precision
    tokens: SpecialTokens
    footprint: Footprint
    files: EngineFiles
    canary: Canary | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value of one token in all layers, bytes."""
        return 2 * self.model.layers * self.model.kv_heads * self.model.head_dim * self.kv_item_bytes

    @property
    def kv_item_bytes(self) -> int:
        """Size of one element of the KV cache, bytes."""
        return _KV_ITEM_BYTES[self.precision.kv]

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, no spaces, so that equal configs have equal digests."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> EngineConfig:
        """Parses and checks; raises pydantic.ValidationError, which names the field."""
        return cls.model_validate_json(data)
