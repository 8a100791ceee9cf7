"""OpenAI's own client, and ruder ones, against the HTTP API of a running agent."""

from __future__ import annotations

import json
import os
import signal

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import push
from tests.support.agents import running_agent, wait_for
from tests.support.http import ask, connection, events, free_port, http_settings, read_to_end, request_bytes

HI = [{"role": "user", "content": "Hi"}]
LONG = {"max_tokens": 1900, "temperature": 0, "extra_body": {"ignore_eos": True}}
LONG_BODY = {"prompt": "x", "max_tokens": 1900, "temperature": 0, "ignore_eos": True}
SLOW = "speculate = false\n"


class Served:
    """An agent with the HTTP API."""

    def __init__(self, agent, port):
        self.agent, self.port = agent, port
        self.url = f"http://127.0.0.1:{port}/v1"

    def openai(self, **options):
        return openai.OpenAI(base_url=self.url, max_retries=0, **{"api_key": "none", **options})

    def runtime(self):
        with self.agent.client() as client:
            return next(client.watch_telemetry(timeout_s=5)).runtime


@pytest.fixture
def serve(short_dir):
    """Starts an agent with the HTTP API, and an engine if one is given; it ends with the test."""
    running = []

    def start(bundle=None, settings="", **http):
        port = free_port()
        context = running_agent(short_dir, settings + http_settings(port, **http))
        running.append(context)
        agent = context.__enter__()
        if bundle is not None:
            push(agent, bundle)
        return Served(agent, port)

    yield start
    for context in running:
        context.__exit__(None, None, None)


def test_an_engine_beside_the_default_one_is_listed_and_answers_by_its_name(serve, tiny, other_tiny):
    served = serve(tiny)
    (variant,) = other_tiny.variants
    with served.agent.client() as client:
        client.push(other_tiny, variant.digest)
        client.activate(variant.digest, beside=True)
    with served.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny", "other"]
        assert client.models.retrieve("other").id == "other"
        for name, answers in (("other", "other"), (variant.digest, "other"), ("tiny", "tiny"), ("", "tiny")):
            asked = {"model": name, "max_tokens": 2, "temperature": 0}
            told = [
                client.completions.create(prompt="Hi", **asked),
                client.chat.completions.create(messages=HI, **asked),
            ]
            assert [answer.model for answer in told] == [answers, answers]
        with pytest.raises(openai.NotFoundError, match="no engine third answers here, but tiny and other"):
            client.completions.create(model="third", prompt="Hi")
        # They are two engines, and not one with two names.
        assert chances(client, "tiny") != chances(client, "other")
    with served.agent.client() as client:
        client.deactivate("other")
    assert [model["id"] for model in ask(served.port, "/v1/models").json["data"]] == ["tiny"]
    assert ask(served.port, "/v1/completions", {"model": "other", "prompt": "Hi"}).status == 404


def chances(client, model):
    answer = client.completions.create(model=model, prompt="Once", max_tokens=4, temperature=0, logprobs=1)
    return answer.choices[0].logprobs.token_logprobs


def test_a_chat_is_answered_in_one_piece_and_as_a_stream_with_the_same_text(serve, tiny):
    served = serve(tiny)
    asked = {"model": "tiny", "messages": HI, "max_tokens": 12, "temperature": 0}
    with served.openai() as client:
        whole = client.chat.completions.create(**asked)
        chunks = list(
            client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    *texts, last, usage = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == choice.message.content
    assert last.choices[0].finish_reason == choice.finish_reason
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens_details.cached_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_asynchronous_client_streams_a_completion(serve, tiny):
    served = serve(tiny)
    asked = {"model": "tiny", "prompt": "Hello", "temperature": 0}
    async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        whole = await client.completions.create(**asked, extra_body={"ignore_eos": True})
        async with await client.completions.create(
            **asked, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            text = "".join([chunk.choices[0].text async for chunk in stream])
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (16, "length")
    assert text == whole.choices[0].text


def test_models_lists_the_active_engine_by_name_and_finds_it_by_digest(serve, tiny):
    served = serve(tiny)
    digest = tiny.variants[0].digest
    with served.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve(digest).id == "tiny"
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve("other")
        answer = client.completions.create(model=digest, prompt="x", max_tokens=1)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    assert (answer.model, answer.system_fingerprint) == ("tiny", digest)


def test_logprobs_come_in_both_formats(serve, tiny):
    served = serve(tiny)
    options = {"model": "tiny", "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with served.openai() as client:
        chat = client.chat.completions.create(messages=HI, logprobs=True, top_logprobs=3, **options)
        text = client.completions.create(prompt="Hi", logprobs=2, **options)
        chunks = list(client.completions.create(prompt="Hi", logprobs=2, stream=True, **options))
    content = chat.choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        # Greedy: the likeliest is the one that was taken.
        assert token.top_logprobs[0].logprob == token.logprob
        assert len(token.top_logprobs) == 3
        assert bytes(token.bytes).decode(errors="replace") == token.token
    logprobs = text.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in streamed for token in part.tokens] == logprobs.tokens
    assert [offset for part in streamed for offset in part.text_offset] == logprobs.text_offset


def test_a_json_schema_is_kept(serve, tiny):
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}, "room": {"enum": ["hall", "attic"]}},
        "required": ["on", "room"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema, "strict": True}}
    served = serve(tiny)
    with served.openai() as client:
        answer = client.chat.completions.create(model="tiny", messages=HI, response_format=wanted)
        regex = client.chat.completions.create(
            model="tiny", messages=HI, extra_body={"structured_outputs": {"regex": "[ab]{3}"}}
        )
    said = json.loads(answer.choices[0].message.content)
    assert isinstance(said["on"], bool)
    assert said["room"] in ("hall", "attic")
    assert set(regex.choices[0].message.content) <= set("ab")


CHAT = {"messages": HI}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {**CHAT, "temperature": 11}, "temperature"),
        ("chat/completions", {**CHAT, "temperature": 1e300}, "temperature"),
        ("chat/completions", {**CHAT, "logit_bias": {"5": -1e300}}, "logit_bias[5]"),
        ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {**CHAT, "stop": [""], "stream": True}, "stop[0]"),
        ("chat/completions", {**CHAT, "logit_bias": {"9999": 1}}, "logit_bias[9999]"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 9999}]}, "messages"),
        (
            "chat/completions",
            {
                **CHAT,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "thing"}},
                },
            },
            "response_format.json_schema.schema",
        ),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ],
)
def test_what_the_engine_refuses_names_the_clients_own_parameter(refusing, path, body, param):
    reply = ask(refusing.port, f"/v1/{path}", body)
    assert reply.status == 400
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", param)
    assert reply.error["message"].startswith(f"{param}: ")


def test_what_exceeds_the_context_has_the_code_that_clients_look_for(refusing):
    reply = ask(refusing.port, "/v1/chat/completions", {**CHAT, "max_completion_tokens": 99_999})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


@pytest.fixture(scope="module")
def refusing(tiny, tmp_path_factory):
    """One agent for the whole table: it is asked for nothing that changes it."""
    port = free_port()
    with running_agent(tmp_path_factory.mktemp("a"), http_settings(port)) as agent:
        push(agent, tiny)
        yield Served(agent, port)


def test_a_client_that_leaves_a_stream_ends_its_request(serve, small):
    served = serve(small, SLOW)
    before = served.runtime().generated_tokens_total
    with served.openai() as client:
        stream = client.completions.create(model="small", prompt="x", stream=True, **LONG)
        next(iter(stream))
        wait_for(lambda: served.runtime().running_sequences == 1, "the request")
        stream.close()
    wait_for(lambda: served.runtime().running_sequences == 0, "the end of the request")
    assert served.runtime().generated_tokens_total - before < LONG["max_tokens"]


def test_a_client_that_does_not_wait_for_a_whole_answer_ends_its_request(serve, small):
    served = serve(small, SLOW)
    before = served.runtime().generated_tokens_total
    with connection(served.port) as opened:
        opened.sendall(request_bytes("/v1/completions", json.dumps(LONG_BODY).encode()))
        wait_for(lambda: served.runtime().running_sequences == 1, "the request")
    wait_for(lambda: served.runtime().running_sequences == 0, "the end of the request")
    assert served.runtime().generated_tokens_total - before < LONG["max_tokens"]


def test_an_answer_that_takes_too_long_is_504_or_an_error_in_its_stream(serve, small):
    served = serve(small, SLOW, timeout_s=0.3)
    reply = ask(served.port, "/v1/completions", LONG_BODY)
    assert (reply.status, reply.error["code"]) == (504, "timeout")
    with served.openai() as client, pytest.raises(openai.APIError, match="deadline"):
        for _ in client.completions.create(model="small", prompt="x", stream=True, **LONG):
            pass


def test_too_many_requests_are_429_and_told_when_to_come_back(serve, small):
    served = serve(small, f"{SLOW}max_sequences = 1\nmax_waiting = 0\n")
    with served.openai() as client:
        stream = client.completions.create(model="small", prompt="x", stream=True, **LONG)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="small", prompt="x")
        stream.close()
    assert error.value.code == "rate_limit_exceeded"
    assert int(error.value.response.headers["retry-after"]) >= 1


def test_an_engine_that_dies_ends_a_stream_with_an_error(serve, small):
    served = serve(small, SLOW)
    with served.openai() as client:
        stream = client.completions.create(model="small", prompt="x", stream=True, **LONG)
        next(iter(stream))
        os.kill(served.agent.worker_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine stopped") as error:
            list(stream)
    assert error.value.code == "engine_unavailable"
    wait_for(lambda: ask(served.port, "/healthz").status == 200, "the next worker")


def test_a_stop_tells_the_streams_that_it_cuts_off(serve, small):
    served = serve(small, f"{SLOW}drain_s = 0.1\n")
    with connection(served.port) as opened:
        opened.sendall(request_bytes("/v1/completions", json.dumps({**LONG_BODY, "stream": True}).encode()))
        first = opened.recv(1)
        assert served.agent.stop() == 0
        body = (first + read_to_end(opened)).partition(b"\r\n\r\n")[2]
    assert b'"message":"the agent stops"' in body
    assert b"[DONE]" not in body


def test_without_an_engine_it_is_503_and_says_how_to_get_one(serve):
    served = serve()
    reply = ask(served.port, "/v1/chat/completions", {"messages": HI})
    assert (reply.status, reply.error["code"]) == (503, "no_engine")
    assert "edgellm push engine" in reply.error["message"]
    assert ask(served.port, "/v1/models").json["data"] == []
    health = ask(served.port, "/healthz")
    assert (health.status, health.json) == (503, {"state": "none"})


def test_a_key_guards_the_api_and_leaves_health_and_metrics_open(serve, tiny):
    served = serve(tiny, api_key="secret")
    with served.openai(api_key="secret") as client:
        assert client.completions.create(model="", prompt="x", max_tokens=1).usage.completion_tokens == 1
    with served.openai(api_key="guess") as client, pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
    assert error.value.code == "invalid_api_key"
    assert ask(served.port, "/healthz").status == ask(served.port, "/metrics").status == 200
    assert "secret" not in served.agent.log


def test_metrics_are_what_prometheus_reads(serve, tiny):
    served = serve(tiny)
    ask(served.port, "/v1/completions", {"prompt": "x", "max_tokens": 7, "ignore_eos": True})

    def value(name):
        text = ask(served.port, "/metrics").body.decode()
        families = text_string_to_metric_families(text)
        return next((s.value for family in families for s in family.samples if s.name == name), None)

    canary = len(tiny.variants[0].config.canary.token_ids)
    wait_for(lambda: value("edgellm_generated_tokens_total") == canary + 7, "the count")
    assert value("edgellm_kv_bound_bytes") > 0


def test_a_stream_is_made_of_events_and_ends_with_done(serve, tiny):
    served = serve(tiny)
    reply = ask(served.port, "/v1/chat/completions", {"messages": HI, "max_tokens": 3, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(reply.body)
    assert done == "[DONE]"
    assert {json.loads(chunk)["object"] for chunk in chunks} == {"chat.completion.chunk"}
