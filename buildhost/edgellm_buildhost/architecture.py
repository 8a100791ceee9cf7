"""What a decoder is made of: its graph, its tensors and its memory follow from these figures and features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{part}_proj" for part in "qkvo")
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
LINEARS = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)
"""The linear maps of a decoder layer, in the order of the computation."""
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"


class Activation(str, Enum):
    """What opens the gate of a feed-forward network."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"


@dataclass(frozen=True)
class Norms:
    """Names of a layer's RMS norms: before attention and feed-forward, and behind them in some families."""

    attention: str = "input_layernorm"
    ffn: str = "post_attention_layernorm"
    attention_output: str | None = None
    ffn_output: str | None = None

    def parts(self) -> tuple[str, ...]:
        """The names that there are."""
        all_parts = (self.attention, self.attention_output, self.ffn, self.ffn_output)
        return tuple(part for part in all_parts if part is not None)


@dataclass(frozen=True)
class AttentionKind:
    """How a layer attends.

    `inverse_frequencies` holds the angular steps of the rotary embedding, radians per position, with any
    scaling of the model already in them: `head_dim / 2` of them, or fewer where only the first channels of a
    head turn. `sliding_window` is the number of positions that a token sees, itself among them.
    """

    inverse_frequencies: tuple[float, ...]
    sliding_window: int | None = None


@dataclass(frozen=True)
class Storage:
    """How a family's published tensors differ from ours in name and form; ours are those of Llama.

    `fused` names stored linears that hold several of ours, one below the other; `norm_offset` is added to
    every stored gain of a norm.
    """

    prefix: str = ""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """A decoder: RMS norms, rotary positions, grouped-query attention, gated feed-forward.

    `attention` has one kind for each layer. `biases` names the linears of a layer (as in `LINEARS`) that add
    one. `attention_scale` multiplies the scores; a softcap `c` turns a value `x` into `c tanh(x / c)`.
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
    attention: tuple[AttentionKind, ...]
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    activation: Activation = Activation.SILU
    norms: Norms = Norms()
    qk_norm: bool = False
    biases: frozenset[str] = frozenset()
    storage: Storage = field(default_factory=Storage)

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.kv_heads * self.head_dim

    def linear_shape(self, part: str) -> tuple[int, int]:
        """`[out, in]` of a layer's linear map, one of `LINEARS`."""
        hidden, ffn = self.hidden_size, self.ffn_size
        return {
            QUERY: (self.query_size, hidden),
            KEY: (self.kv_size, hidden),
            VALUE: (self.kv_size, hidden),
            OUTPUT: (hidden, self.query_size),
            GATE: (ffn, hidden),
            UP: (ffn, hidden),
            DOWN: (hidden, ffn),
        }[part]

    def vectors(self) -> dict[str, int]:
        """Length of each gain and bias of a layer, by names as `self_attn.q_proj.bias`."""
        found = {f"{part}.weight": self.hidden_size for part in self.norms.parts()}
        if self.qk_norm:
            found |= {f"{part}.weight": self.head_dim for part in (QUERY_NORM, KEY_NORM)}
        found |= {f"{part}.bias": self.linear_shape(part)[0] for part in LINEARS if part in self.biases}
        return found


def layer_tensor(layer: int, part: str, kind: str = "weight") -> str:
    """The full name of a layer's tensor, as in `layer_tensor(0, "mlp.up_proj")`."""
    return f"model.layers.{layer}.{part}.{kind}"


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the architecture needs, by our names, with its shape."""
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}
    linears = {f"{part}.weight": architecture.linear_shape(part) for part in LINEARS}
    vectors = {part: (length,) for part, length in architecture.vectors().items()}
    for layer in range(architecture.layers):
        shapes |= {f"model.layers.{layer}.{part}": shape for part, shape in (linears | vectors).items()}
    shapes[FINAL_NORM] = (hidden,)
    if not architecture.tied_embedding:
        shapes[HEAD] = (vocab, hidden)
    return shapes


def row_ranges(architecture: Architecture, name: str, most_bytes: int) -> Iterator[tuple[int, int]]:
    """All rows of a table, first and last plus one, in pieces of so many bytes as float32, or of one row."""
    rows, columns = tensor_shapes(architecture)[name]
    step = max(1, most_bytes // (4 * columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
