"""Rebuilds `tokenizer.json` from the vocabulary inside a GGUF file (byte-level BPE)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from edgellm_buildhost.errors import BuildError

# The pattern published with Llama 3's tokenizer; other byte-level families use GPT-2's, which ByteLevel
# has built in.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_USE_HF = "give the Hugging Face directory of this model instead"


@dataclass(frozen=True)
class GgufVocabulary:
    """The `tokenizer.ggml.*` fields that decide how text becomes ids; a token's id is its place in
    `tokens`.
    """

    model: str
    pre_tokenizer: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]


def tokenizer_json(vocabulary: GgufVocabulary, source: Path) -> bytes:
    """The tokenizer in the format of the `tokenizers` library, equal bytes for an equal vocabulary.

    Raises BuildError for a vocabulary that is not byte-level BPE or splits words in a way not known here.
    """
    if vocabulary.model != "gpt2":
        raise BuildError(
            f"{source}: tokenizer.ggml.model {vocabulary.model!r} is not supported (byte-level BPE, "
            f"'gpt2', is)",
            _USE_HF,
        )
    if len(vocabulary.token_types) not in {0, len(vocabulary.tokens)}:
        raise BuildError(
            f"{source}: {len(vocabulary.tokens)} tokens but {len(vocabulary.token_types)} token types",
            _USE_HF,
        )
    tokenizer = Tokenizer(_bpe(vocabulary, source))
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary.pre_tokenizer, source)
    tokenizer.decoder = decoders.ByteLevel()
    control = {int(TokenType.CONTROL), int(TokenType.UNKNOWN)}
    typed = list(zip(vocabulary.tokens, vocabulary.token_types, strict=False))
    special = [AddedToken(text, special=True, normalized=False) for text, kind in typed if kind in control]
    user = [AddedToken(text, normalized=False) for text, kind in typed if kind == int(TokenType.USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(user)
    return str(tokenizer.to_str(pretty=False)).encode()


def _bpe(vocabulary: GgufVocabulary, source: Path) -> models.BPE:
    merges = []
    for merge in vocabulary.merges:
        left, found, right = merge.partition(" ")
        if not found:
            raise BuildError(f"{source}: tokenizer.ggml.merges holds {merge!r}, which is no pair", _USE_HF)
        merges.append((left, right))
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise BuildError(f"{source}: tokenizer.ggml.tokens holds a token twice", _USE_HF)
    try:
        return models.BPE(ids, merges, ignore_merges=vocabulary.pre_tokenizer == "llama-bpe")
    except Exception as error:  # the library raises a bare Exception for a merge of unknown tokens
        raise BuildError(
            f"{source}: tokenizer.ggml.merges does not fit the tokens: {error}", _USE_HF
        ) from error


def _pre_tokenizer(name: str, source: Path) -> pre_tokenizers.PreTokenizer:
    if name in {"smollm", "starcoder", "refact", "command-r"}:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in {"gpt-2", "default"}:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in {"llama-bpe", "llama3"}:
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
        return pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    raise BuildError(f"{source}: tokenizer.ggml.pre {name!r} is not known here", _USE_HF)
