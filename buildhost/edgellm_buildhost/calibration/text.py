"""Texts for calibration and for the quality report, and the windows of tokens that a model reads of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.errors import BuildError

_HELD_OUT_STEP, _HELD_OUT = 5, 2
_MAX_FILE_BYTES = 256 << 20
_BLOCK_LINES, _BLOCK_CHARACTERS, _MOST_BLOCKS = 256, 32 << 10, 64
"""Two million characters are a hundred times what is read of them in windows."""


@dataclass(frozen=True)
class Text:
    """A text and what to call it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of its bytes in UTF-8, hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def calibration_text() -> Text:
    """Most of the language reference that comes with every Python: prose, code, grammar and tables.

    No network is needed. Another version of Python has another text, and so another calibration. Topics quote
    each other at length: a paragraph that `held_out_text` has too is left out.
    """
    kept = {_words(paragraph) for topic in _topics(held_out=True) for paragraph in topic.split("\n\n")}
    topics = (
        "\n\n".join(paragraph for paragraph in topic.split("\n\n") if _words(paragraph) not in kept)
        for topic in _topics(held_out=False)
    )
    return Text("Python language reference, four of five topics", "\n".join(topics))


def held_out_text() -> Text:
    """Every fifth topic, which `calibration_text` leaves out."""
    return Text("Python language reference, every fifth topic", "\n".join(_topics(held_out=True)))


def read_text(path: Path) -> Text:
    """A file of the user's: plain text, or JSON lines with a string `text` or a chat's `messages`.

    Raises BuildError naming file, line and field.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise BuildError(f"{path}: more than {_MAX_FILE_BYTES:,} bytes", "a few megabytes are plenty")
        content = data.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise BuildError(
            f"{path}: no such file", "give a text file, or JSON lines with a field text"
        ) from None
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8: {error}", "save the text as UTF-8") from error
    except OSError as error:
        raise BuildError(f"{path}: cannot be read: {error.strerror}", "give a readable text file") from error
    if path.suffix in {".jsonl", ".ndjson"}:
        content = "\n".join(_json_lines(path, content))
    return Text(path.name, content)


def windows(tokenizer: TokenizerFiles, text: Text, count: int, tokens: int) -> NDArray[np.int64]:
    """Up to `count` windows from all over the text, int64 [windows, tokens].

    Each begins with the model's first token, if its texts do. Raises BuildError when the text is shorter than
    one window.
    """
    first = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = _encode(tokenizer, text.content)
    length = tokens - len(first)
    if len(ids) < length:
        raise BuildError(
            f"{text.name}: {len(ids)} tokens, a window has {length}",
            "give a longer text, about a hundred windows of what the engine will read",
        )
    there = min(count, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, there).astype(np.int64)
    return np.array([[*first, *ids[start : start + length]] for start in starts], np.int64)


def _topics(*, held_out: bool) -> Iterator[str]:
    from pydoc_data.topics import topics  # noqa: PLC0415 - 700 kB that only a calibration needs

    for number, name in enumerate(sorted(topics)):
        if (number % _HELD_OUT_STEP == _HELD_OUT) == held_out:
            yield topics[name]


def _words(paragraph: str) -> str:
    """Without the line breaks and indents, which differ where one topic quotes another."""
    return " ".join(paragraph.split())


def _json_lines(path: Path, content: str) -> Iterator[str]:
    # Not splitlines: the other characters that it takes for the end of a line may stand in a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BuildError(f"{path}:{number}: not JSON: {error}", "write one JSON object a line") from error
        text = _text_of(path, number, entry)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BuildError(
                f"{path}:{number}: not a text: {error}", "write characters above U+FFFF as whole pairs"
            ) from error
        yield text


def _text_of(path: Path, number: int, entry: object) -> str:
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return str(entry["text"])
        messages = entry.get("messages")
        if isinstance(messages, list):
            parts = [item.get("content") if isinstance(item, dict) else None for item in messages]
            if parts and all(isinstance(part, str) for part in parts):
                return "\n".join(str(part) for part in parts)
    raise BuildError(
        f"{path}:{number}: neither a string text nor messages with contents",
        'write lines as {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    )


def _encode(tokenizer: TokenizerFiles, content: str) -> NDArray[np.int32]:
    """Block by block: an encoder takes a hundred times the memory of what it is given at once.

    Of a long text blocks from all over it are enough.
    """
    encoder = Tokenizer.from_str(tokenizer.tokenizer_json.decode())
    blocks = list(_blocks(content))
    if len(blocks) > _MOST_BLOCKS:
        blocks = [blocks[place] for place in np.linspace(0, len(blocks) - 1, _MOST_BLOCKS).astype(int)]
    ids = [np.empty(0, np.int32)]
    for start, end in blocks:
        ids.append(np.array(encoder.encode(content[start:end], add_special_tokens=False).ids, np.int32))
    return np.concatenate(ids)


def _blocks(content: str) -> Iterator[tuple[int, int]]:
    """Start and end of pieces of whole lines; only lines longer than a piece are cut."""
    start = 0
    while start < len(content):
        most = min(start + _BLOCK_CHARACTERS, len(content))
        end = start
        for _ in range(_BLOCK_LINES):
            end = content.find("\n", end, most) + 1 or most
            if end == most:
                break
        yield start, end
        start = end
