import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgellm_agent.worker.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def pieces(tokenizer, text, stop=()):
    stream = TextStream(tokenizer, stop)
    out = []
    for token in tokenizer.encode(text).ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out, True
    return [*out, stream.finish()], False


@given(text=st.text(max_size=60))
def test_a_character_arrives_whole_with_its_last_byte(tokenizer, text):
    out, _ = pieces(tokenizer, text)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out) or "\ufffd" in text


def test_a_stop_string_ends_the_text_before_it_and_is_never_shown(tokenizer):
    out, stopped = pieces(tokenizer, "one\ntwo END three", stop=("END",))
    assert stopped
    assert "".join(out) == "one\ntwo "


def test_what_only_began_like_a_stop_string_is_shown(tokenizer):
    out, stopped = pieces(tokenizer, "EN route E", stop=("END",))
    assert not stopped
    assert "".join(out) == "EN route E"


@given(text=st.text("ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_shown_text_is_what_lies_before_the_first_stop(tokenizer, text, stop):
    out, stopped = pieces(tokenizer, text, tuple(stop))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert stopped == bool(ends)
    shown = "".join(out)
    assert text.startswith(shown)
    assert not any(s in shown for s in stop)
    if not stopped:
        assert shown == text
