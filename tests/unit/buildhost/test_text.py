"""Texts for calibration: what is read, what is refused with its line, and what memory a long one takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edgellm_buildhost.calibration import text as texts
from edgellm_buildhost.calibration.text import Text, calibration_text, held_out_text, read_text, windows
from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.errors import BuildError
from tests.support.builds import ROOT
from tests.support.tiny_models import BOS_ID, EOS_ID, tiny_tokenizer_json

MIB = 1 << 20


def tokenizer(*, add_bos: bool = False) -> TokenizerFiles:
    return TokenizerFiles(tiny_tokenizer_json(300).encode(), None, BOS_ID, (EOS_ID,), add_bos)


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        read_text(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    text = read_text(written(tmp_path, "mine.txt", "Größe\n\n  two\n"))
    assert (text.name, text.content) == ("mine.txt", "Größe\n\n  two\n")


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_json_lines_give_texts_and_the_contents_of_chats(tmp_path: Path, suffix: str) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}
    lines = [json.dumps({"text": "first"}), "", "  \t", json.dumps(chat), json.dumps({"text": "last"})]
    path = written(tmp_path, f"mine.{suffix}", "\n".join(lines))
    assert read_text(path).content == "first\nHi?\nHello.\nlast"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_every_system_read_the_same(tmp_path: Path, end: str) -> None:
    lines = end.join(['{"text": "one"}', '{"text": "two"}', ""]).encode()
    assert read_text(written(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + lines)).content == "one\ntwo"
    assert read_text(written(tmp_path, "a.txt", f"one{end}two")).content == "one\ntwo"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b"])
def test_a_character_that_only_looks_like_the_end_of_a_line_ends_none(tmp_path: Path, character: str) -> None:
    line = json.dumps({"text": f"a{character}b"}, ensure_ascii=character < " ")
    assert read_text(written(tmp_path, "a.jsonl", line)).content == f"a{character}b"


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "cut',
        "plain words",
        "[" * 100_000,
        "1" * 5_000,
        '{"text": 7}',
        '{"words": "x"}',
        '["x"]',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        '{"text": "half a pair: \\ud83d"}',
    ],
)
def test_a_line_that_is_no_text_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, "a.jsonl", f'{{"text": "one"}}\n\n{line}\n{{"text": "four"}}\n')
    message = refused(path).message
    assert message.startswith(f"{path}:3: ")
    assert len(message) < len(str(path)) + 200


def test_bytes_that_are_not_utf8_are_named_by_their_place(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "a.txt", b"caf\xe9"))
    assert "not UTF-8" in error.message
    assert "position 3" in error.message


def test_a_path_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "absent.txt").message
    assert "Is a directory" in refused(tmp_path).message


def test_no_more_is_read_than_the_stated_limit_even_of_what_has_no_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_MAX_FILE_BYTES", 1000)
    assert len(read_text(written(tmp_path, "a.txt", "x" * 1000)).content) == 1000
    assert "more than 1,000 bytes" in refused(written(tmp_path, "a.txt", "x" * 1001)).message
    assert "more than 1,000 bytes" in refused(Path("/dev/zero")).message


@pytest.mark.parametrize(("content", "found"), [("", 0), ("zyxzyxzyxz", 10)])
def test_a_text_shorter_than_a_window_is_refused_with_both_lengths(content: str, found: int) -> None:
    with pytest.raises(BuildError, match=f"mine: {found} tokens, a window has 11"):
        windows(tokenizer(), Text("mine", content), 4, 11)


def test_a_text_of_one_window_is_long_enough_and_begins_as_the_model_s_texts_do() -> None:
    (plain,) = windows(tokenizer(), Text("mine", "zyxzyxzyx"), 4, 9)
    (begun,) = windows(tokenizer(add_bos=True), Text("mine", "zyxzyxzyx"), 4, 10)
    assert plain.dtype == np.int64
    assert begun.tolist() == [BOS_ID, *plain]


@settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from("ab \n\u2028é😀"), min_size=60, max_size=3000))
def test_windows_are_pieces_of_the_text_from_its_start_to_its_end(content: str) -> None:
    files = tokenizer()
    ids = Tokenizer.from_str(files.tokenizer_json.decode()).encode(content).ids
    assume(len(ids) >= 20)
    found = windows(files, Text("mine", content), 5, 20)
    assert found.shape == (min(5, len(ids) // 20), 20)
    assert found[0].tolist() == ids[:20]
    if len(found) > 1:
        assert found[-1].tolist() == ids[-20:]


def test_of_a_long_text_the_windows_are_from_all_over_it() -> None:
    content = "".join(f"{number:07d}\n" for number in range(800_000))
    files = tokenizer()
    decode = Tokenizer.from_str(files.tokenizer_json.decode()).decode
    found = windows(files, Text("mine", content), 16, 64)
    numbers = [int(decode(window.tolist()).split("\n")[1]) for window in found]
    assert len(found) == 16
    assert numbers[0] == 1
    assert numbers[-1] > 799_900
    assert max(np.diff(numbers)) < 2 * 800_000 / 16


_PEAK = """
import resource, sys
from pathlib import Path
from edgellm_buildhost.calibration.text import read_text, windows
from tests.unit.buildhost.test_text import tokenizer
files = tokenizer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(windows(files, read_text(Path(sys.argv[1])), 16, 512).shape)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("end", ["\n", " "], ids=["lines", "one line"])
def test_a_long_text_takes_a_few_times_its_own_memory(tmp_path: Path, end: str) -> None:
    line = "The engine reads many lines, of which this is one." + end
    path = written(tmp_path, "long.txt", line * (50_000_000 // len(line)))
    shape, peak = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shape == "(16, 512)"
    # The bytes, the characters, and two million of them encoded; as a whole it would take a hundred times.
    assert int(peak) < 5 * path.stat().st_size


def test_no_paragraph_that_is_measured_on_was_calibrated_with() -> None:
    read, kept = (
        {" ".join(paragraph.split()) for paragraph in text().content.split("\n\n") if paragraph.strip()}
        for text in (calibration_text, held_out_text)
    )
    shared = read & kept
    # Where two topics meet a paragraph is glued to the next title.
    assert sum(map(len, shared)) < 0.001 * sum(map(len, kept))


def test_what_comes_with_python_is_the_same_each_time_and_of_five_topics_one_is_held_out() -> None:
    from pydoc_data.topics import topics

    kept = {name for name, topic in topics.items() if topic in held_out_text().content}
    assert 0.15 < len(kept) / len(topics) < 0.25
    assert (calibration_text(), held_out_text()) == (calibration_text(), held_out_text())
    assert len(calibration_text().content) > 2 * len(held_out_text().content)


@pytest.mark.parametrize("text", [calibration_text, held_out_text])
def test_what_comes_with_python_is_long_enough_for_every_window(text) -> None:  # type: ignore[no-untyped-def]
    assert windows(tokenizer(), text(), 16, 512).shape == (16, 512)
