"""What an app may ask of an answer, over gRPC from a real agent and its worker."""

import asyncio
import json
import re
import threading

import pytest

from edgellm.client import AsyncClient, Constraint, Sampling
from edgellm.errors import RemoteError
from tests.support.agents import wait_for

SCHEMA = {
    "type": "object",
    "properties": {"gripper": {"enum": ["open", "closed"]}, "torque": {"type": "integer", "maximum": 99}},
    "required": ["gripper", "torque"],
    "additionalProperties": False,
}
LONG_TEXT = "the valve of the pump is open and the light is on. " * 8


def complete(client, prompt="a robot", **options):
    with client.generate(prompt, **options) as answer:
        chunks = list(answer)
    return chunks, answer.completion


def test_an_answer_has_the_shape_that_its_schema_asks_for(serving):
    with serving.client() as client:
        for seed in range(3):
            _, completion = complete(
                client,
                sampling=Sampling(temperature=1.0, seed=seed),
                max_tokens=400,
                constraint=Constraint.json_schema(SCHEMA),
            )
            value = json.loads(completion.text)
            assert value["gripper"] in ("open", "closed")
            assert value["torque"] <= 99
            assert completion.finish_reason == "stop"


def test_what_a_grammar_forces_is_not_computed_token_by_token(serving):
    with serving.client() as client:
        _, completion = complete(client, max_tokens=100, constraint=Constraint.regex("open the gripper now!"))
    assert completion.text == "open the gripper now!"
    assert completion.accepted_draft_tokens > 0


def test_each_token_comes_with_its_log_probability_and_the_alternatives(serving):
    with serving.client() as client:
        chunks, completion = complete(client, max_tokens=12, ignore_eos=True, top_logprobs=3)
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [one for chunk in chunks for one in chunk.logprobs]
    assert [one.token.id for one in logprobs] == tokens
    assert len(tokens) == completion.completion_tokens
    for one in logprobs:
        assert len(one.top) == 3
        assert one.top[0].logprob >= one.top[1].logprob >= one.top[2].logprob
        assert one.token.id == one.top[0].id  # greedy
    assert b"".join(one.token.text for one in logprobs).decode(errors="replace") == completion.text


def test_a_banned_token_never_comes_and_a_stop_token_ends_the_answer(serving):
    with serving.client() as client:
        chunks, _ = complete(client, max_tokens=5, ignore_eos=True)
        first = chunks[0].token_ids[0]
        banned, _ = complete(
            client, max_tokens=20, ignore_eos=True, sampling=Sampling(logit_bias={first: -100})
        )
        assert first not in [token for chunk in banned for token in chunk.token_ids]
        _, stopped = complete(client, max_tokens=20, ignore_eos=True, stop_token_ids=[first])
        assert (stopped.completion_tokens, stopped.finish_reason) == (0, "stop")
        _, later = complete(client, max_tokens=20, ignore_eos=True, stop_token_ids=[first], min_tokens=4)
        assert later.completion_tokens >= 4


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(serving):
    async def texts():
        async with AsyncClient(serving.target) as client:

            async def one(seed):
                sampling = Sampling(temperature=10.0, top_p=0.95, seed=seed)
                async with client.generate("x", max_tokens=30, ignore_eos=True, sampling=sampling) as answer:
                    return [token async for chunk in answer for token in chunk.token_ids]

            alone = [await one(seed) for seed in range(4)]
            return alone, await asyncio.gather(*(one(seed) for seed in range(4)))

    alone, together = asyncio.run(texts())
    assert len({tuple(tokens) for tokens in alone}) == 4
    # Another batch may move logits a little (see the design), so only the beginning must agree.
    assert [tokens[:3] for tokens in alone] == [tokens[:3] for tokens in together]


def test_a_conversation_that_goes_on_reuses_what_was_computed(serving):
    with serving.client() as client:
        _, first = complete(client, LONG_TEXT, max_tokens=8, ignore_eos=True)
        _, second = complete(client, LONG_TEXT + first.text + " and then", max_tokens=4, ignore_eos=True)
    assert first.cached_tokens == 0
    assert second.cached_tokens >= first.prompt_tokens - 1


BAD = [
    ({"sampling": Sampling(temperature=float("nan"))}, "sampling.temperature"),
    ({"sampling": Sampling(top_p=0.0)}, "sampling.top_p"),
    ({"sampling": Sampling(min_p=1.5)}, "sampling.min_p"),
    ({"sampling": Sampling(repetition_penalty=0.0)}, "sampling.repetition_penalty"),
    ({"sampling": Sampling(logit_bias={5: float("inf")})}, "sampling.logit_bias"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop_token_ids": [1 << 30]}, "stop_token_ids"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"constraint": Constraint.json_schema('{"type": ')}, "constraint.json_schema"),
    (
        {"constraint": Constraint.json_schema({"type": "string", "minLength": 5, "maxLength": 2})},
        "constraint",
    ),
    ({"constraint": Constraint.regex("a?" * 20_000)}, "constraint.regex"),
    ({"constraint": Constraint.lark("start: nowhere")}, "constraint.lark"),
]


@pytest.mark.parametrize(("options", "field"), BAD, ids=[f"{f} {i}" for i, (_, f) in enumerate(BAD)])
def test_bad_input_is_refused_with_the_field(serving, options, field):
    with serving.client() as client, pytest.raises(RemoteError) as error:
        complete(client, **{"max_tokens": 8, **options})
    assert error.value.code == "INVALID_ARGUMENT"
    assert field in str(error.value)


@pytest.mark.parametrize("prompt", ["", "word " * 200_000], ids=["empty", "1 MB"])
def test_a_prompt_of_no_use_is_refused(serving, prompt):
    with serving.client() as client, pytest.raises(RemoteError) as error:
        complete(client, prompt)
    assert error.value.code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
    assert re.search("empty|fit|bytes", str(error.value))


def test_other_streams_go_on_while_bad_requests_are_refused(busy):
    tokens, ended = [], threading.Event()

    def read():
        with busy.client() as client, client.generate("go", max_tokens=1500, ignore_eos=True) as answer:
            for chunk in answer:
                tokens.extend(chunk.token_ids)
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(lambda: tokens, "the first token")
        with busy.client() as client:
            for options, _ in BAD:
                with pytest.raises(RemoteError):
                    complete(client, **{"max_tokens": 8, **options})
    finally:
        reader.join(60)
    assert ended.is_set()
    assert len(tokens) == 1500
