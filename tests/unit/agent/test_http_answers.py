"""Tokens, log probabilities and errors in OpenAI's shapes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from edgellm.v1 import inference_pb2
from edgellm_agent import errors
from edgellm_agent.http.answers import ChatFormat, Head, TextFormat
from edgellm_agent.http.errors import to_api_error

HEAD = Head("cmpl-1", "tiny", "sha256:0", 0)


def logprob(token, value=-1.0):
    chance = inference_pb2.TokenChance(id=1, logprob=value, text=token)
    return inference_pb2.TokenLogprob(token=chance, top=[chance])


@given(st.text(), st.integers(1, 3))
def test_a_tokens_offset_is_the_number_of_characters_before_it(text, size):
    data = text.encode()
    tokens = [data[i : i + size] for i in range(0, len(data), size)]
    choice = TextFormat(HEAD).whole(text, [logprob(token) for token in tokens], "stop")
    done = b""
    for token, offset in zip(tokens, choice["logprobs"]["text_offset"], strict=True):
        assert offset == len(done.decode(errors="ignore"))
        done += token


def test_pieces_of_a_character_keep_their_own_names():
    first, second = "ä".encode()[:1], "ä".encode()[1:]
    choice = TextFormat(HEAD).whole("ä", [logprob(first), logprob(second)], "stop")
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa4"]
    chat = ChatFormat(HEAD).whole("ä", [logprob(first), logprob(second)], "stop")
    assert [token["bytes"] for token in chat["logprobs"]["content"]] == [[0xC3], [0xA4]]


def test_a_token_that_can_never_come_is_still_json():
    for form in (ChatFormat(HEAD), TextFormat(HEAD)):
        choice = form.whole("x", [logprob(b"x", float("-inf"))], "stop")
        assert "-9999.0" in json.dumps(choice, allow_nan=False)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.TooLargeError("x", 2, 1), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.NotFoundError("x"), 404, "invalid_request_error", "model_not_found"),
        (errors.BusyError("x"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (errors.UnavailableError("x"), 503, "server_error", "engine_unavailable"),
        (errors.PreconditionError("x"), 503, "server_error", "no_engine"),
        (errors.DeadlineError("x"), 504, "server_error", "timeout"),
        (errors.EngineError("x"), 500, "server_error", "engine_failed"),
    ],
)
def test_each_error_has_its_status(error, status, kind, code):
    told = to_api_error(error)
    assert (told.status, told.type, told.code, str(told)) == (status, kind, code, "x")


def test_retry_after_is_whole_seconds_and_never_none():
    assert to_api_error(errors.BusyError("x", 0.2)).headers == {"retry-after": "1"}
    assert to_api_error(errors.UnavailableError("x", 2.5)).headers == {"retry-after": "3"}


def test_an_unexpected_error_keeps_its_words_to_the_log(caplog):
    told = to_api_error(ValueError("the prompt was: ..."))
    assert told.status == 500
    assert "prompt" not in json.dumps(told.body())
    assert "unexpected error" in caplog.text


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.temperature", "temperature"),
        ("chat.messages[3].role", "messages[3].role"),
        ("constraint.regex", "structured_outputs.regex"),
        ("max_tokens", "max_completion_tokens"),
        ("max_tokens_of_others", "max_tokens_of_others"),
    ],
)
def test_a_field_is_called_what_the_client_called_it(field, param):
    params = {
        "chat": "messages",
        "chat.messages": "messages",
        "constraint.regex": "structured_outputs.regex",
        "max_tokens": "max_completion_tokens",
    }
    told = to_api_error(errors.InvalidError(field, "is wrong"), params)
    assert (told.param, str(told)) == (param, f"{param}: is wrong")
