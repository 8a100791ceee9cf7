"""Another basis for a model's residual stream: the same function, with weights that lie on no grid.

The weights at hand were published rounded to 4 bits. Rounding them to that grid again looks free, so
nothing can be learned from them as they are. A change of basis by an orthogonal matrix Q leaves what the
model computes as it is, since an RMS norm sees only lengths: what is written to the stream is multiplied by
Q, what reads from it by Q transposed, with the norms' gains in between. Every weight becomes a sum of
hundreds of others.

- `tilted`: Q is close to the identity. A channel keeps 96 % of its energy, and the rest is spread over all
  others. That is noise of about 3/4 of a 4-bit step in every weight: enough to forget the grid, and too
  little to hide which channels are large. Norms keep their gains. This is the one for comparisons.
- `rotated`: Q is any orthogonal matrix, gains are folded into the weights. No channel of the stream sticks
  out any more, and weights are close to normally distributed: easier for plain rounding than published models
  are, and with nothing left in the stream for methods that look for large channels.

Neither touches what lies between two linears of a layer: the inputs of o_proj and down_proj keep the channels
that they have. In both, head and embedding become two matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.hugging_face import shards, write_settings, write_weights
from edgellm_buildhost.architecture import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    KEY,
    OUTPUT,
    QUERY,
    UP,
    VALUE,
    layer_tensor,
)
from edgellm_buildhost.checkpoint.base import Checkpoint

Doubles = NDArray[np.float64]
_ATTENTION_NORM, _FFN_NORM = "input_layernorm", "post_attention_layernorm"
_NORM_OF = {
    QUERY: _ATTENTION_NORM,
    KEY: _ATTENTION_NORM,
    VALUE: _ATTENTION_NORM,
    GATE: _FFN_NORM,
    UP: _FFN_NORM,
}
_KEPT_ENERGY = 0.96
# Gains below this part of their root mean square are raised to it: what comes from other channels is divided
# by them.
_LEAST_GAIN = 0.2


@dataclass(frozen=True)
class Basis:
    """An orthogonal matrix, `[hidden, hidden]`, and whether norms keep their gains in it."""

    matrix: Doubles
    keeps_gains: bool

    def gains(self, gains: NDArray[np.float32]) -> Doubles:
        """The gains of a norm in this basis."""
        if not self.keeps_gains:
            return np.ones(len(gains))
        size = np.abs(gains.astype(np.float64))
        return np.asarray(np.maximum(size, _LEAST_GAIN * np.sqrt((size**2).mean())))

    def reader(self, weight: NDArray[np.float32], gains: NDArray[np.float32]) -> NDArray[np.float32]:
        """A linear `[out, hidden]` behind a norm with these gains."""
        turned = (weight.astype(np.float64) * gains) @ self.matrix
        return np.asarray(turned / self.gains(gains), np.float32)

    def writer(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """A linear `[hidden, in]` that is added to the stream."""
        return np.asarray(self.matrix.T @ weight.astype(np.float64), np.float32)

    def table(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """The embedding `[vocab, hidden]`."""
        return np.asarray(embedding.astype(np.float64) @ self.matrix, np.float32)


def tilted(size: int, seed: int) -> Basis:
    """Close to the identity: the Cayley transform of a small skew-symmetric matrix.

    With entries of variance e²/size its eigenvalues have the mean square e², so the diagonal of the
    transform is about 1 - 2 e².
    """
    normal = np.random.default_rng(seed).standard_normal((size, size))
    tilt = np.sqrt((1.0 - np.sqrt(_KEPT_ENERGY)) / 2.0)
    upper = np.triu(normal, 1) * (tilt / np.sqrt(size))
    skew = upper - upper.T
    matrix = np.linalg.solve(np.eye(size) - skew, np.eye(size) + skew)
    return Basis(np.asarray(matrix, np.float64), keeps_gains=True)


def rotated(size: int, seed: int) -> Basis:
    """Drawn evenly from all orthogonal matrices: QR of a normal one, signs of the diagonal made positive."""
    orthogonal, triangle = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return Basis(np.asarray(orthogonal * np.sign(np.diag(triangle)), np.float64), keeps_gains=False)


BASES = {"tilted": tilted, "rotated": rotated}


def write_in_basis(checkpoint: Checkpoint, kind: str, directory: Path, seed: int = 0) -> None:
    """Write the model in a basis of that kind: a Hugging Face directory, float32, a shard for each layer.

    For models of the Llama family. Equal arguments give equal bytes.
    """
    basis = BASES[kind](checkpoint.architecture.hidden_size, seed)
    shape = dataclasses.replace(checkpoint.architecture, tied_embedding=False)
    count = len(shards(shape))
    write_weights(directory, _parts(checkpoint, basis), count)
    write_settings(directory, shape, checkpoint.tokenizer, "float32")


def _parts(checkpoint: Checkpoint, basis: Basis) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    for layer in range(checkpoint.architecture.layers):
        yield dict(_layer(checkpoint, basis, layer))
    gains = checkpoint.tensor(FINAL_NORM)
    embedding = checkpoint.tensor(EMBEDDING)
    head = embedding if checkpoint.architecture.tied_embedding else checkpoint.tensor(HEAD)
    yield {
        EMBEDDING: basis.table(embedding),
        FINAL_NORM: basis.gains(gains).astype(np.float32),
        HEAD: basis.reader(head, gains),
    }


def _layer(checkpoint: Checkpoint, basis: Basis, layer: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for norm in (_ATTENTION_NORM, _FFN_NORM):
        gains = checkpoint.tensor(layer_tensor(layer, norm))
        yield layer_tensor(layer, norm), basis.gains(gains).astype(np.float32)
        for part in (part for part, its_norm in _NORM_OF.items() if its_norm == norm):
            name = layer_tensor(layer, part)
            yield name, basis.reader(checkpoint.tensor(name), gains)
    for part in (OUTPUT, DOWN):
        name = layer_tensor(layer, part)
        yield name, basis.writer(checkpoint.tensor(name))
