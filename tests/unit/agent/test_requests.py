"""Every field of a request is checked, named by its path, and cheap refusals come before the tokenizer."""

from __future__ import annotations

import math

import pytest
from google.protobuf import json_format
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from edgellm.bundle.config import SpecialTokens
from edgellm.v1 import inference_pb2
from edgellm_agent.worker.requests import DEFAULT_MAX_TOKENS, TooLongError, parse_request
from edgellm_agent.worker.sampler import SamplingParams
from edgellm_agent.worker.text import PromptError, TextModel
from tests.support.tiny_bundle import make_config

CONTEXT = 1000
CONFIG = make_config(tokens=SpecialTokens(eos_ids=(2, 5)))
TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}"


class ByteText(TextModel):
    """A real tokenizer with a token for each byte, which counts how often it is asked."""

    longest_token_bytes = 1
    encoded = 0

    def encode(self, prompt):
        self.encoded += 1
        return super().encode(prompt)

    def encode_rendered(self, text):
        self.encoded += 1
        return super().encode_rendered(text)


def make_text(directory, template=TEMPLATE):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / CONFIG.files.tokenizer))
    (directory / CONFIG.files.chat_template).write_text(template)
    return ByteText(directory, CONFIG)


@pytest.fixture
def text(tmp_path):
    return make_text(tmp_path)


@pytest.fixture(scope="module")
def shared_text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text"))


def request(**fields):
    prompt = {} if "chat" in fields else {"prompt": "Hi"}
    return json_format.ParseDict({**prompt, **fields}, inference_pb2.GenerateRequest())


def refusal(text, asked, context=CONTEXT):
    with pytest.raises(PromptError) as error:
        parse_request(asked, text, CONFIG, context)
    return error.value


def test_a_plain_request_has_the_defaults(text):
    parsed = parse_request(request(), text, CONFIG, CONTEXT)
    assert len(parsed.tokens) == 2
    assert (parsed.min_tokens, parsed.max_tokens) == (0, DEFAULT_MAX_TOKENS)
    assert (parsed.end_ids, parsed.stop) == ({2, 5}, ())
    assert parsed.sampling == SamplingParams()
    assert (parsed.seed, parsed.constraint) == (None, None)


def test_every_field_arrives(text):
    sampling = {
        "temperature": 0.5,
        "topP": 0.25,
        "seed": 7,
        "topK": 40,
        "minP": 0.125,
        "repetitionPenalty": 1.5,
        "presencePenalty": -2,
        "frequencyPenalty": 2,
        "logitBias": {"0": -100, "299": 100},
    }
    asked = request(
        sampling=sampling,
        maxTokens=20,
        minTokens=20,
        stop=["\n", "\0", "é" * 128, "\n"],
        stopTokenIds=[0, 299, 0],
        topLogprobs=20,
        constraint={"regex": "a*"},
    )
    parsed = parse_request(asked, text, CONFIG, CONTEXT)
    assert parsed.sampling == SamplingParams(
        0.5, 0.25, 40, 0.125, 1.5, -2.0, 2.0, {0: -100.0, 299: 100.0}, 20
    )
    assert (parsed.min_tokens, parsed.max_tokens, parsed.seed) == (20, 20, 7)
    assert parsed.stop == ("\n", "\0", "é" * 128)
    assert parsed.end_ids == {0, 2, 5, 299}
    assert parsed.constraint.regex == "a*"


def test_ignoring_the_model_s_end_keeps_the_request_s(text):
    asked = request(ignoreEos=True, stopTokenIds=[7], minTokens=3)
    parsed = parse_request(asked, text, CONFIG, CONTEXT)
    assert (parsed.end_ids, parsed.min_tokens) == ({7}, 3)


def test_an_end_token_beyond_the_vocabulary_is_no_end(text):
    config = make_config(tokens=SpecialTokens(eos_ids=(2, 300, -1)))
    assert parse_request(request(), text, config, CONTEXT).end_ids == {2}


def test_what_is_set_to_its_default_is_not_refused(text):
    asked = request(sampling={"topP": 1, "seed": 0, "repetitionPenalty": 1}, topLogprobs=0)
    parsed = parse_request(asked, text, CONFIG, CONTEXT)
    assert parsed.sampling == SamplingParams(top_logprobs=0)
    assert parsed.seed == 0


NAN, INF = math.nan, math.inf
OUT_OF_RANGE = [
    *(("temperature", "sampling.temperature", value) for value in (-0.1, 10.1, NAN, INF)),
    *(("top_p", "sampling.top_p", value) for value in (0, -0.5, 1.01, NAN, INF)),
    *(("min_p", "sampling.min_p", value) for value in (-0.01, 1.01, NAN, INF)),
    *(("repetition_penalty", "sampling.repetition_penalty", value) for value in (0, -1, 10.1, NAN, INF)),
    *(("presence_penalty", "sampling.presence_penalty", value) for value in (-2.1, 2.1, NAN, -INF)),
    *(("frequency_penalty", "sampling.frequency_penalty", value) for value in (-2.1, 2.1, NAN, INF)),
    *(("logit_bias", "sampling.logit_bias[123]", {123: value}) for value in (-101, 101, NAN, INF)),
    ("logit_bias", "sampling.logit_bias[300]", {7: 1, 300: 0}),
    ("logit_bias", "sampling.logit_bias", dict.fromkeys(range(1025), 1.0)),
]


@pytest.mark.parametrize(("name", "path", "value"), OUT_OF_RANGE)
def test_sampling_out_of_range_is_named_before_anything_is_tokenized(text, name, path, value):
    asked = inference_pb2.GenerateRequest(
        prompt="Hi", sampling=inference_pb2.Sampling(**{name: value}), max_tokens=5
    )
    assert refusal(text, asked).field == path
    assert text.encoded == 0


WRONG = {
    "stop": {"stop": ["x"] * 17},
    "stop[1]": {"stop": ["x", ""]},
    "stop[0]": {"stop": ["é" * 129]},
    "stop_token_ids": {"stopTokenIds": [1] * 65},
    "stop_token_ids[0]": {"stopTokenIds": [300]},
    "stop_token_ids[2]": {"stopTokenIds": [1, 2, 4294967295]},
    "top_logprobs": {"topLogprobs": 21},
    "constraint": {"constraint": {}},
    "constraint.json_schema": {"constraint": {"jsonSchema": ""}},
    "constraint.regex": {"constraint": {"regex": "é" * 32769}},
    "constraint.lark": {"constraint": {"lark": ""}},
    "prompt": {"prompt": "x" * CONTEXT},
    "chat": {"chat": {"messages": [{"role": "user", "content": "x" * 500}] * 2}},
    "chat.messages[1].role": {"chat": {"messages": [{"role": "user"}, {"role": "tool"}]}},
}


@pytest.mark.parametrize(("path", "fields"), WRONG.items(), ids=WRONG)
def test_what_is_wrong_is_named_before_anything_is_tokenized(text, path, fields):
    assert refusal(text, request(**fields)).field == path
    assert text.encoded == 0


LENGTHS = {
    "max_tokens": ({"maxTokens": CONTEXT - 1}, "leaves 998 of the context's 1000 tokens, not 999"),
    "min_tokens": ({"minTokens": 6, "maxTokens": 5}, "6 is more than 5"),
    "min_tokens ": ({"minTokens": 513}, "513 is more than 512, which max_tokens is unless it is set"),
    "prompt": ({"prompt": ""}, "empty"),
    "chat.messages": ({"chat": {}}, "at least one message"),
}


@pytest.mark.parametrize(("path", "fields", "words"), [(k, *v) for k, v in LENGTHS.items()], ids=LENGTHS)
def test_what_does_not_go_with_the_prompt_is_named(text, path, fields, words):
    error = refusal(text, request(**fields))
    assert error.field == path.strip()
    assert words in str(error)


def test_a_chat_that_the_template_makes_longer_than_the_context_is_refused(text):
    asked = request(chat={"messages": [{"role": "user", "content": "x" * 8}]})
    error = refusal(text, asked, context=10)
    assert error.field == "chat"
    assert "10 bytes are at least 10 tokens" in str(error)
    assert parse_request(asked, text, CONFIG, 11).max_tokens == 1


def test_a_chat_of_too_many_messages_is_refused_before_the_template_sees_it(text):
    messages = [{"role": "user", "content": ""}] * 4097
    assert "at most 4096 messages" in str(refusal(text, request(chat={"messages": messages})))
    text.close()
    assert text._template._process is None


def test_a_chat_of_which_the_template_leaves_leaves_nothing_is_refused(tmp_path):
    asked = request(chat={"messages": [{"role": "user", "content": "x"}]})
    assert refusal(make_text(tmp_path, template=""), asked).field == "chat.messages"


def test_a_request_without_a_prompt_is_refused(text):
    assert refusal(text, inference_pb2.GenerateRequest()).field == "input"


def test_a_megabyte_for_a_small_context_is_refused_without_the_tokenizer(text):
    text.longest_token_bytes = 100
    error = refusal(text, request(prompt="x" * (1 << 20)))
    assert error.field == "prompt"
    assert "1048576 bytes are at least 10486 tokens" in str(error)
    assert text.encoded == 0


@settings(deadline=None)
@example(prompt="Hi", context=12, asked=10)
@given(prompt=st.text(min_size=1, max_size=40), context=st.integers(1, 60), asked=st.integers(0, 60))
def test_a_request_is_taken_if_prompt_and_answer_fit_and_only_then(shared_text, prompt, context, asked):
    size = len(prompt.encode())
    if size + max(asked, 1) <= context:
        parsed = parse_request(request(prompt=prompt, maxTokens=asked), shared_text, CONFIG, context)
        assert parsed.max_tokens == (asked or context - size)
    else:
        error = refusal(shared_text, request(prompt=prompt, maxTokens=asked), context)
        assert isinstance(error, TooLongError)
        longer, field = (1, "prompt") if size + 1 > context else (asked, "max_tokens")
        assert (error.field, error.tokens) == (field, size + longer)
