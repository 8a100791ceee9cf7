"""The routes over an engine that does just what the test says."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")

from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent import errors
from edgellm_agent.access import rules
from edgellm_agent.access.caller import Role
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.http import streaming
from edgellm_agent.http.app import Api
from edgellm_agent.http.settings import HttpSettings
from tests.support.http import ask, connection, events, http_server, request_bytes

ASKED = {"prompt": "x"}


class Stream:
    """A TokenStream of texts; an exception among them is raised, an event is waited for."""

    def __init__(self, steps):
        self.steps = steps
        self.closed = asyncio.Event()
        self.finished = None

    async def __aiter__(self):
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, asyncio.Event):
                await step.wait()
            else:
                yield worker_pb2.Delta(text=step, token_ids=[1])
        self.finished = worker_pb2.Finished(
            reason=inference_pb2.FINISH_REASON_STOP, usage=inference_pb2.Usage(completion_tokens=3)
        )

    async def aclose(self):
        self.closed.set()


class Manager:
    """A manager of one engine, or of none."""

    def __init__(self, *steps, state="serving", active="sha256:0"):
        self.stream, self.active, self.submitted = Stream(steps), active, []
        spec = SimpleNamespace(digest="sha256:0", config=SimpleNamespace(name="tiny"))
        engine = SimpleNamespace(spec=spec, state=state, submit=self.submit)
        self.running = None if state == "none" else engine
        self.rack = SimpleNamespace(all=[] if self.running is None else [SimpleNamespace(engine=engine)])

    def submit(self, request, deadline_s, client):
        self.submitted.append((request, deadline_s, client))
        return self.stream

    def active_digest(self):
        return self.active

    def engine_for(self, model):
        if self.running is None:
            raise errors.PreconditionError("no engine")
        return self.running


def server(manager, access=None, **settings):
    given = HttpSettings(listen="127.0.0.1:1", open=True, **settings)
    return http_server(Api(manager, SimpleNamespace(latest=None), given, access).app())


async def post(manager, body, **settings):
    async with server(manager, **settings) as port:
        return await asyncio.to_thread(ask, port, "/v1/completions", body)


async def test_an_engine_that_still_loads_is_503_and_worth_waiting_for():
    reply = await post(Manager(state="none"), ASKED)
    assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
    assert int(reply.headers["retry-after"]) >= 1


async def test_another_model_is_404():
    manager = Manager("a")
    reply = await post(manager, ASKED | {"model": "other"})
    assert (reply.status, reply.error["param"]) == (404, "model")
    assert manager.submitted == []


@pytest.mark.parametrize(("user", "client"), [({}, "http:127.0.0.1"), ({"user": "arm"}, "http:arm")])
async def test_a_client_is_who_it_says_or_its_address(user, client):
    manager = Manager("a")
    await post(manager, ASKED | user, timeout_s=7)
    ((_, deadline_s, named),) = manager.submitted
    assert (deadline_s, named) == (7, client)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_before_the_first_token_has_a_status_of_its_own(stream):
    reply = await post(Manager(errors.BusyError("full")), ASKED | {"stream": stream})
    assert (reply.status, reply.error["message"]) == (429, "full")


async def test_what_fails_later_ends_the_stream_with_an_error():
    manager = Manager("a", errors.EngineError("broken"))
    reply = await post(manager, ASKED | {"stream": True})
    first, last = map(json.loads, events(reply.body))
    assert reply.status == 200
    assert first["choices"][0]["text"] == "a"
    assert (last["error"]["message"], last["error"]["code"]) == ("broken", "engine_failed")
    assert manager.stream.closed.is_set()


async def test_what_fails_unexpectedly_tells_no_details(caplog):
    reply = await post(Manager("a", KeyError("secret")), ASKED)
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert b"secret" not in reply.body
    assert "secret" in caplog.text


async def test_a_delta_without_text_is_not_sent():
    reply = await post(Manager("a", "", "b"), ASKED | {"stream": True})
    texts = [json.loads(event)["choices"][0]["text"] for event in events(reply.body)[:-1]]
    assert texts == ["a", "b", ""]


async def test_a_first_token_is_sent_before_the_second_is_there():
    second = asyncio.Event()
    async with server(Manager("first", second, "second")) as port:
        with connection(port) as opened:
            opened.sendall(request_bytes("/v1/completions", b'{"prompt": "x", "stream": true}'))
            seen = b""
            while b"first" not in seen:
                seen += await asyncio.to_thread(opened.recv, 65536)
            second.set()
            while b"[DONE]" not in seen:
                seen += await asyncio.to_thread(opened.recv, 65536)
    assert b"second" in seen


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_client_that_leaves_ends_its_stream_while_no_token_comes(stream):
    never = asyncio.Event()
    manager = Manager("a", never)
    async with server(manager) as port:
        with connection(port) as opened:
            opened.sendall(
                request_bytes("/v1/completions", b'{"prompt": "x", "stream": %s}' % stream.encode())
            )
            await submitted(manager)
            assert not manager.stream.closed.is_set()
        await asyncio.wait_for(manager.stream.closed.wait(), 20)
        never.set()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_hangs_does_not_hang_its_client(monkeypatch, stream):
    monkeypatch.setattr(streaming, "_SLACK_S", 0.0)
    manager = Manager("a", asyncio.Event())
    reply = await post(manager, ASKED | {"stream": stream}, timeout_s=0.1)
    assert b'"code":"timeout"' in reply.body
    assert reply.status == (200 if stream else 504)
    assert manager.stream.closed.is_set()


async def test_a_stop_ends_what_waits_with_words():
    manager = Manager(asyncio.Event())
    async with server(manager) as port:
        asked = asyncio.create_task(asyncio.to_thread(ask, port, "/v1/completions", ASKED))
        await submitted(manager)
    reply = await asked
    assert (reply.status, reply.error["message"]) == (503, "the agent stops")


async def submitted(manager):
    async def poll():
        while not manager.submitted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 20)


@pytest.mark.parametrize("state", ["starting", "serving", "draining", "restarting", "none"])
async def test_health_is_200_only_while_it_serves(state):
    async with server(Manager(state=state)) as port:
        reply = await asyncio.to_thread(ask, port, "/healthz")
    assert (reply.status, reply.json) == (200 if state == "serving" else 503, {"state": state})


async def test_other_paths_and_methods_are_refused_in_the_same_shape():
    async with server(Manager()) as port:
        for path, method, status in (
            ("/v2", "GET", 404),
            ("/healthz/", "GET", 404),
            ("/healthz", "PUT", 405),
        ):
            reply = await asyncio.to_thread(ask, port, path, method=method)
            assert (reply.status, reply.error["type"]) == (status, "invalid_request_error")


async def test_http_callers_have_so_many_calls_as_one_caller_and_they_come_free_again():
    wait = asyncio.Event()
    manager = Manager("a", wait)
    async with server(manager, AccessSettings(max_calls=1)) as port:
        asked = asyncio.create_task(asyncio.to_thread(ask, port, "/v1/completions", ASKED))
        await submitted(manager)
        for path, body in (("/v1/completions", ASKED), ("/v1/models", None)):
            reply = await asyncio.to_thread(ask, port, path, body)
            assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
            assert int(reply.headers["retry-after"]) >= 1
        assert (await asyncio.to_thread(ask, port, "/healthz")).status == 200
        wait.set()
        assert (await asked).status == 200
        assert (await asyncio.to_thread(ask, port, "/v1/completions", ASKED)).status == 200
    assert len(manager.submitted) == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models"])
async def test_the_table_of_rules_holds_for_http_too(monkeypatch, path):
    for method in ("InferenceService/Generate", "InferenceService/ListModels"):
        monkeypatch.setitem(rules.RULES, method, rules.Rule(Role.OPERATOR))
    manager = Manager("a")
    async with server(manager) as port:
        reply = await asyncio.to_thread(ask, port, path, None if path.endswith("models") else ASKED)
    assert (reply.status, reply.error["code"]) == (403, "permission_denied")
    assert manager.submitted == []
