"""A body means what OpenAI says it means, or it is refused with the parameter's name."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from edgellm_agent.http.errors import ApiError
from edgellm_agent.http.schema import ChatRequest, CompletionRequest, parse
from edgellm_agent.http.translate import translate_chat, translate_completion

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**body):
    return translate_chat(parse(ChatRequest, json.dumps({"messages": HI, **body}).encode()))


def completion(**body):
    return translate_completion(parse(CompletionRequest, json.dumps({"prompt": "Hi", **body}).encode()))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**32}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"speed": 1}}, "stream_options.speed"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
        ({"colour": "red"}, "colour"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Bo"}]}, "messages[0].name"),
        ({"user": "x" * 257}, "user"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_named(body, param):
    with pytest.raises(ApiError) as error:
        chat(**body)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "."}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_a_completions_parameter_that_cannot_be_honoured_is_named(body, param):
    with pytest.raises(ApiError) as error:
        completion(**body)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "guided_json": {"minimum": NaN}}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as error:
        parse(CompletionRequest, body)
    assert error.value.status == 400


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "type", "text"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_no_body_does_anything_but_pass_or_be_refused(body):
    for asked in (body, {"messages": HI, "stop": body}, {"messages": HI, "logit_bias": body}):
        with contextlib.suppress(ApiError):
            translate_chat(parse(ChatRequest, json.dumps(asked).encode()))


def test_what_says_nothing_passes():
    plain = chat()
    assert chat(n=1, tools=[], tool_choice="auto", stop=None, user=None, model=None) == plain
    assert chat(metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=False) == plain
    replayed = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[replayed]).request.chat.messages[0].content == "Yes"


def test_defaults_are_those_of_openai_where_it_has_any():
    assert chat().request.sampling.temperature == completion().request.sampling.temperature == 1
    assert completion().request.max_tokens == 16
    # The engine's own default.
    assert chat().request.max_tokens == 0
    assert not chat().request.sampling.HasField("top_p")
    assert not chat().request.HasField("top_logprobs")


def test_sampling_is_carried_over():
    sampling = chat(
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.25,
        seed=-1,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.5,
        logit_bias={"7": -100},
    ).request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 0, 0.25)
    assert sampling.seed == 2**64 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert sampling.repetition_penalty == 1.5
    assert dict(sampling.logit_bias) == {7: -100}


def test_ends_are_carried_over():
    request = chat(stop="end", min_tokens=2, ignore_eos=True, stop_token_ids=[5]).request
    assert (list(request.stop), request.min_tokens, request.ignore_eos) == (["end"], 2, True)
    assert list(request.stop_token_ids) == [5]
    assert list(chat(stop=["a", "b"]).request.stop) == ["a", "b"]


def test_the_newer_name_of_max_tokens_wins():
    both = chat(max_tokens=5, max_completion_tokens=6)
    assert both.request.max_tokens == 6
    assert both.params["max_tokens"] == "max_completion_tokens"


def test_parts_of_text_are_joined_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = chat(messages=[{"role": "developer", "content": parts}]).request
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "Hello")]


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "json_schema",
            json.dumps(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"guided_json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ({"guided_regex": "a"}, "regex", "a"),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
    ],
)
def test_a_form_becomes_a_constraint(body, kind, text):
    request = chat(**body).request
    assert request.constraint.WhichOneof("kind") == kind
    assert getattr(request.constraint, kind) == text


def test_plain_text_is_no_constraint():
    assert not chat(response_format={"type": "text"}).request.HasField("constraint")
