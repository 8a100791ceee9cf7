"""The contract of a checkpoint: its architecture, its tokenizer, and its tensors by name, read lazily."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_buildhost.errors import BuildError

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family: RMS norms, rotary positions, grouped-query attention, gated SiLU.

    `inverse_frequencies` holds the `head_dim / 2` angular steps of the rotary embedding, radians per
    position, with any scaling of the model already in them.
    """

    family: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    rms_epsilon: float
    tied_embedding: bool
    inverse_frequencies: tuple[float, ...]
    sliding_window: int | None = None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class TokenizerFiles:
    """What a device needs to turn text into ids and back.

    `tokenizer_json` is the format of the `tokenizers` library; `chat_template` is Jinja, or None where the
    model has none.
    """

    tokenizer_json: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool


class Checkpoint(ABC):
    """A published model. Tensors carry Hugging Face names, whatever the file calls them.

    A checkpoint maps its files and keeps no tensor that it handed out, so memory follows the largest tensor
    and not the model.
    """

    name: str
    architecture: Architecture
    tokenizer: TokenizerFiles

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The tensor `name`, float32; linear weights are `[out, in]`.

        Raises BuildError when it is missing, has another shape than the architecture says, or is not finite.
        """
        expected = tensor_shapes(self.architecture)[name]
        tensor = self._read(name)
        if tensor.shape != expected:
            raise BuildError(
                f"{self.name}: tensor {name} has shape {list(tensor.shape)}, the configuration says "
                f"{list(expected)}",
                "the weights and the configuration belong to different models: fetch both again "
                "from one place",
            )
        if not np.isfinite(tensor).all():
            bad = int(tensor.size - np.isfinite(tensor).sum())
            raise BuildError(
                f"{self.name}: tensor {name} holds {bad} values that are not finite",
                "the checkpoint is damaged, or was saved in float16 after an overflow: fetch it "
                "again or save it in bfloat16",
            )
        return tensor

    @abstractmethod
    def _read(self, name: str) -> NDArray[np.float32]:
        """The tensor as stored, float32; raises BuildError when it is missing or cannot be read."""


def layer_tensor(layer: int, part: str) -> str:
    """The full name of a layer's weight, as in `layer_tensor(0, "mlp.up_proj")`."""
    return f"model.layers.{layer}.{part}.weight"


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the architecture needs, with its shape, in the order of the computation."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_size
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (architecture.query_size, hidden),
        "self_attn.k_proj": (architecture.kv_size, hidden),
        "self_attn.v_proj": (architecture.kv_size, hidden),
        "self_attn.o_proj": (hidden, architecture.query_size),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (architecture.vocab_size, hidden)}
    for layer in range(architecture.layers):
        shapes |= {layer_tensor(layer, part): shape for part, shape in parts.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not architecture.tied_embedding:
        shapes[HEAD] = (architecture.vocab_size, hidden)
    return shapes
