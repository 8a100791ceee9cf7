"""What a request can say reaches the device from both clients, and what an answer can say comes back."""

from __future__ import annotations

import asyncio

import pytest

from edgellm.client import AsyncClient, Client, Constraint, Sampling, TokenChance, TokenLogprob
from edgellm.v1 import inference_pb2


async def answers(target, kind, **options):
    """The pieces of an answer, from either client."""
    if kind == "sync":
        with Client(target) as client:
            return await asyncio.to_thread(list, client.generate("Hi", **options))
    async with AsyncClient(target) as client:
        return [chunk async for chunk in client.generate("Hi", **options)]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_all_that_a_request_can_say_reaches_the_device(target, device, kind):
    sampling = Sampling(
        temperature=0.5,
        top_p=0.25,
        seed=2**64 - 1,
        top_k=40,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={7: -100, 8: 0.5},
    )
    await answers(
        target,
        kind,
        model="tiny",
        sampling=sampling,
        min_tokens=2,
        stop_token_ids=(5, 6),
        top_logprobs=0,
        constraint=Constraint.regex("[ab]+"),
    )
    assert device.requests == [
        inference_pb2.GenerateRequest(
            model="tiny",
            prompt="Hi",
            sampling=inference_pb2.Sampling(
                temperature=0.5,
                top_p=0.25,
                seed=2**64 - 1,
                top_k=40,
                min_p=0.125,
                repetition_penalty=1.5,
                presence_penalty=-2,
                frequency_penalty=2,
                logit_bias={7: -100, 8: 0.5},
            ),
            min_tokens=2,
            stop_token_ids=[5, 6],
            top_logprobs=0,
            constraint=inference_pb2.Constraint(regex="[ab]+"),
        )
    ]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_log_probabilities_come_with_their_tokens(target, kind):
    chunks = await answers(target, kind, top_logprobs=2, max_tokens=1)
    likely = TokenChance(id=0, logprob=-0.5, text=b"Hello")
    others = (TokenChance(100, -1.5, b"\xc3"), TokenChance(101, -2.5, b"\xc3"))
    assert [chunk.logprobs for chunk in chunks] == [(TokenLogprob(likely, others),)]


@pytest.mark.parametrize(
    ("constraint", "kind", "text"),
    [
        (Constraint.json_schema({"type": "object"}), "json_schema", '{"type": "object"}'),
        (Constraint.json_schema('{ "type": "object" }'), "json_schema", '{ "type": "object" }'),
        (Constraint.json_schema({}), "json_schema", "{}"),
        (Constraint.regex("yes|no"), "regex", "yes|no"),
        (Constraint.lark('start: "a"'), "lark", 'start: "a"'),
        # What is empty is there all the same, for the device to refuse.
        (Constraint.regex(""), "regex", ""),
    ],
)
def test_a_constraint_is_one_of_three_kinds(target, device, constraint, kind, text):
    with Client(target) as client:
        client.generate("Hi", constraint=constraint).read()
    sent = device.requests[0].constraint
    assert (sent.WhichOneof("kind"), getattr(sent, kind)) == (kind, text)


async def test_the_device_can_tell_clients_apart(target, device):
    with Client(target) as one, Client(target) as two, Client(target, client_id="arm-controller") as named:
        for client in (one, one, two, named):
            client.generate("Hi").read()
    async with AsyncClient(target) as third, AsyncClient(target, client_id="arm-controller") as same:
        for client in (third, same):
            await client.generate("Hi").read()
    first, again, second, arm, other, arm_again = device.clients
    assert first == again
    assert arm == arm_again == "arm-controller"
    assert len({first, second, other}) == 3
    assert all(len(name) == 32 for name in (first, second, other))


@pytest.mark.parametrize("client_id", ["", " a", "a\nb", "\N{GREEK SMALL LETTER ALPHA}", "a" * 129])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_s_name_must_fit_into_a_header(kind, client_id):
    with pytest.raises(ValueError, match="client_id must have 1 to 128"):
        kind("unix:///nowhere.sock", client_id=client_id)
