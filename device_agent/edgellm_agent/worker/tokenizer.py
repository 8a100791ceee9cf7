"""The tokenizer of a bundle: loaded only if it can be run within bounds.

The library runs a bundle's regular expressions by backtracking (Oniguruma), which takes any time for some of
them, and obeys what a file says of padding. What stands in the way of a bound is refused at load.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

# Vocabularies of 262,144 tokens with their merges have 34 MB.
MAX_FILE_BYTES = 64 << 20
MAX_PATTERN_BYTES = 4 << 10
# Without a bound, in a row: each multiplies the time by the length of the text.
MAX_REPETITIONS = 3
# A text may grow by so much before it is cut into tokens: a space becomes the three bytes of U+2581.
MAX_GROWTH = 64
# One text at a time, in the caller's thread: a pool of threads would take the cores from the engine.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`; raises ValueError that says what is wrong with it."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"the bundle's {path.name} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        with survives_panic():
            tokenizer = Tokenizer.from_file(str(path))
            _check_parts(tokenizer)
    except Exception as error:
        raise ValueError(f"the bundle's {path.name} is not usable: {error}") from error
    # These would make any text as long, or as short, as the file says.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, no special ones added; raises ValueError if the tokenizer fails.

    Of a batch, since the library holds the GIL while it encodes a single text (0.9 s for a megabyte).
    """
    with survives_panic():
        return list(tokenizer.encode_batch([text], add_special_tokens=False)[0].ids)


@contextlib.contextmanager
def survives_panic() -> Iterator[None]:
    """Makes a ValueError of a panic in the library, which is not an `Exception`: it would end a thread."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)[:300]) from None


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a regular expression whose matching may take exponential time.

    That needs a group or a repetition which is repeated: `(a+)+`, `(a|a)*`, `a**?*?`. No pattern of the field
    repeats a group other than by "?", nor has more than two repetitions without a bound in a row. A backward
    reference is as bad, and so is what hides from this check: comments, spaces that do not count, absence and
    conditions.
    """
    if len(pattern.encode()) > MAX_PATTERN_BYTES:
        raise ValueError(f"a pattern has more than {MAX_PATTERN_BYTES:,} bytes")
    if re.search(r"\(\?(?:[#~(]|[a-zA-Z-]*x)", pattern):
        raise ValueError(f"the pattern {pattern!r:.80} has a comment, a condition or the flag x")
    bare = re.sub(r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.)", _bare_escape, pattern, flags=re.DOTALL)
    bare = _without_classes(bare)
    if re.search(r"[)*+?}]\{|[)}*+?]\*|[)}]\+|[*+?}][+?][*+?{]", bare):
        raise ValueError(f"the pattern {pattern!r:.80} repeats a group, which may take any time to match")
    if any(len(re.findall(r"[*+?}]\+|[*+]|,\}", part)) > MAX_REPETITIONS for part in _alternatives(bare)):
        raise ValueError(f"the pattern {pattern!r:.80} has more than {MAX_REPETITIONS} repetitions in a row")


def _bare_escape(match: re.Match[str]) -> str:
    text = match[0]
    if text[1] in "123456789kg":
        raise ValueError("a pattern refers back to a group")
    return "e"


def _without_classes(pattern: str) -> str:
    """The pattern with a letter for each bracketed class, classes in classes included."""
    out, depth = [], 0
    for i, character in enumerate(pattern):
        if character == "[":
            out.append("c" if depth == 0 else "")
            depth += 1
        elif character == "]" and depth and pattern[i - 1] != "[" and pattern[i - 2 : i] != "[^":
            depth -= 1
        elif not depth:
            out.append(character)
    return "".join(out)


def _alternatives(bare: str) -> list[str]:
    """What the outermost bars divide."""
    parts, depth = [""], 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _check_parts(tokenizer: Tokenizer) -> None:
    growth = 1
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        # Its state alone: the whole file as Python objects would take ten times its bytes.
        for item in _items(json.loads(bytes(part.__getstate__())) if part is not None else {}):
            pattern = item.get("pattern")
            if isinstance(pattern, dict) and "Regex" in pattern:
                check_pattern(str(pattern["Regex"]))
            if part is not tokenizer.decoder:
                growth *= _growth(item)
    if growth > MAX_GROWTH:
        raise ValueError(f"its parts may make a text more than {MAX_GROWTH} times as long")


def _items(part: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects of a part, the outermost first."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from _items(value)
    elif isinstance(part, list):
        for value in part:
            yield from _items(value)


def _growth(item: dict[str, Any]) -> int:
    """How many times as long a part may make a text."""
    match item.get("type"):
        case "Replace":
            return 1 + len(str(item.get("content", "")).encode())
        case "Prepend":
            return 1 + len(str(item.get("prepend", "")).encode())
        case "ByteLevel":
            return 2  # a byte above 127 becomes a character of two; ten of them in a row a thousand
        case "Metaspace":
            return 3
        case "Precompiled":
            return 8
        case _:
            return 1
