"""Writes a checkpoint of random weights as large as those that people deploy, to measure builds with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.hugging_face import shards, write_settings, write_weights
from edgellm_buildhost.architecture import Architecture, AttentionKind, tensor_shapes
from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.checkpoint.rope import plain_frequencies

_SPREAD = 0.02  # what models of this size are initialized with
_BLOCK_VALUES = 1 << 26
_STEP_VALUES = 7_919_993  # prime, so that no two tensors begin at one place of the block
_THETA = 10000.0


def seven_billion(layers: int = 32) -> Architecture:
    """The shape of Llama 2 7B, or the first layers of it."""
    head_dim = 128
    kind = AttentionKind(tuple(plain_frequencies(_THETA, head_dim).tolist()))
    return Architecture(
        family="llama",
        layers=layers,
        hidden_size=4096,
        heads=32,
        kv_heads=32,
        head_dim=head_dim,
        ffn_size=11008,
        vocab_size=32000,
        context_length=4096,
        rms_epsilon=1e-5,
        tied_embedding=False,
        attention=(kind,) * layers,
        attention_scale=head_dim**-0.5,
    )


def write_random_model(shape: Architecture, directory: Path, seed: int = 0) -> int:
    """Write a Hugging Face directory in bfloat16, a shard for each layer; the bytes of its weights.

    Every tensor is cut from one block of random values, each at another place: real noise at the speed of
    the disk. Equal arguments give equal bytes.
    """
    parts = shards(shape)
    total = write_weights(directory, _parts(shape, parts, _random_block(seed)), len(parts))
    tokenizer = TokenizerFiles(_tokenizer(shape.vocab_size), None, 1, (2,), add_bos=True)
    write_settings(directory, shape, tokenizer, "bfloat16")
    return total


def _parts(
    shape: Architecture, parts: Sequence[Sequence[str]], block: NDArray[np.generic]
) -> Iterator[dict[str, NDArray[np.generic]]]:
    tensor_shape = tensor_shapes(shape)
    place = 0
    for names in parts:
        tensors = {}
        for name in names:
            tensors[name] = _tensor(block, place, tensor_shape[name])
            place = (place + _STEP_VALUES) % block.size
        yield tensors


def _random_block(seed: int) -> NDArray[np.generic]:
    values = np.random.default_rng(seed).standard_normal(_BLOCK_VALUES, np.float32)
    values *= np.float32(_SPREAD)
    return values.astype(ml_dtypes.bfloat16)


def _tensor(block: NDArray[np.generic], place: int, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """The block from `place` on, and again from its start where it ends; gains are ones."""
    if len(shape) == 1:
        return np.ones(shape, block.dtype)
    count = int(np.prod(shape))
    return np.resize(np.roll(block, -place)[:count], count).reshape(shape)


def _tokenizer(vocab_size: int) -> bytes:
    """Bytes as tokens, and names for the ids that are left."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<unused{number}>" for number in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    return str(tokenizer.to_str()).encode()


def main() -> int:
    """Writes it where the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big_model", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="32 are 13.5 GB, each 0.4 GB")
    options = parser.parse_args()
    total = write_random_model(seven_billion(options.layers), options.directory)
    print(f"{options.directory}: {total / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
