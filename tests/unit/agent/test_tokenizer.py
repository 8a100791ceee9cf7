# ruff: noqa: E501, RUF001 - patterns are as they are
"""A bundle's tokenizer is loaded only if no text can make it run for ever; if it fails, a request fails."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from edgellm_agent.worker import tokenizer as tokenizers_
from edgellm_agent.worker.tokenizer import check_pattern, encoded, load_tokenizer

# As GPT-2, Llama 3, Qwen, o200k, DeepSeek, BLOOM, CLIP and Mistral's have them.
PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}?",
    " {2,}",
    "[0-9][0-9][0-9]",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_the_field_are_taken(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*$", "(?:a*)*b", "(a?){99}", "(?:[a-z]+)*", r"(\))+", "(a+)\\1", r"\k<x>", r"(?<x>a\g<x>)",
        "(?x)(a+) +", "(a+)(?#hidden)+", "(?~a)", "(?(1)a|b)", "a{2,9}{2,9}", "a{1,9}*", "a+{9}", "x" * 5000,
        "[)](a+)+", "[]a](b*)*", r"\p{L}(a|b)*", "(?i-x:a)+", "a**?*?b", "a+?*", "a?+*", "(a+)?*", "a*a*a*a*b", "a*(b|c*)a*a{2,}x|y",
    ],
)  # fmt: skip
def test_patterns_that_may_take_any_time_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        check_pattern(pattern)


def byte_level(**parts):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def saved(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_file_with_such_a_pattern_is_refused_by_name(tmp_path):
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    path = saved(tmp_path, byte_level(pre_tokenizer=pre_tokenizers.Sequence([split])))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*repeats a group"):
        load_tokenizer(path)


def test_a_normalizer_that_makes_much_of_little_is_refused(tmp_path):
    grow = normalizers.Sequence([normalizers.Replace("a", "a" * 9), normalizers.Replace("a", "a" * 9)])
    with pytest.raises(ValueError, match="64 times"):
        load_tokenizer(saved(tmp_path, byte_level(normalizer=grow)))
    fine = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    load_tokenizer(saved(tmp_path, byte_level(normalizer=fine)))


def test_parts_that_each_double_a_text_are_refused_together(tmp_path):
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False) for _ in range(7)]
    with pytest.raises(ValueError, match="64 times"):
        load_tokenizer(saved(tmp_path, byte_level(pre_tokenizer=pre_tokenizers.Sequence(parts))))
    load_tokenizer(saved(tmp_path, byte_level(pre_tokenizer=pre_tokenizers.Sequence(parts[:6]))))


def test_padding_and_truncation_that_a_file_asks_for_are_not_done(tmp_path):
    made = byte_level()
    made.enable_padding(length=100_000)
    made.enable_truncation(3)
    loaded = load_tokenizer(saved(tmp_path, made))
    assert len(encoded(loaded, "hello")) == 5


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = saved(tmp_path, byte_level())
    monkeypatch.setattr(tokenizers_, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="more than"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b"[" * 9999, json.dumps({"version": "1.0"}).encode()]
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_panic_in_the_library_is_an_error_like_any_other(capfd):
    # Backtracking that the library gives up on after ten million steps.
    stuck = byte_level(pre_tokenizer=pre_tokenizers.Split(Regex("(a+)+$"), "isolated"))
    with pytest.raises(ValueError, match="retry-limit"):
        encoded(stuck, "a" * 40 + "b")


def test_ids_are_those_of_a_single_text(tmp_path):
    made = byte_level()
    for text in ("", "a", "hello wörld \u2581 世界"):
        assert encoded(made, text) == made.encode(text, add_special_tokens=False).ids
