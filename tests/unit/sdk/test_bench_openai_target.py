"""A server of OpenAI's API is measured like a device, and its failures are counted like a device's."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("httpx")

from benchmarks.openai_target import OpenAITarget
from edgellm.bench import Bounds, PromptSource, Request, Sweep, fit_words
from edgellm.bench import ask as ask_target
from edgellm.bench.sweep import Point
from edgellm.client import Message
from edgellm.errors import DeviceUnreachableError


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, asked))
        status, lines = self.server.answer(asked)
        body = "".join(f"{line}\n\n" for line in lines).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after", "3")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def answer(asked):
    """So many tokens, a usage as the last event, as servers that count do."""
    prompt = asked.get("prompt") or " ".join(message["content"] for message in asked["messages"])
    tokens = asked["max_tokens"]
    piece = {"text": "w "} if "prompt" in asked else {"delta": {"content": "w "}}
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": tokens}
    events = [{"choices": [{"delta": {"role": "assistant"}}]}, *[{"choices": [piece]}] * tokens]
    return 200, [": ping", *(f"data: {json.dumps(e)}" for e in [*events, {"choices": [], "usage": usage}])]


@pytest.fixture
def server():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.answer, httpd.asked = lambda asked: (200, [*answer(asked)[1], "data: [DONE]"]), []
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def ask(address, request, **options):
    async def main():
        async with OpenAITarget(address, "m", **options) as target:
            return await ask_target(target, request)

    return asyncio.run(main())


def test_text_goes_to_completions_and_comes_back_counted(server):
    record = ask(url(server), Request("one two three", 4), extra={"ignore_eos": True})
    assert (record.text, record.output_tokens, record.usage.prompt_tokens) == ("w w w w ", 4, 3)
    assert sum(tokens for _, tokens in record.arrivals) == 4
    ((path, asked),) = server.asked
    assert path == "/v1/completions"
    assert (asked["max_tokens"], asked["temperature"], asked["ignore_eos"]) == (4, 0, True)


def test_a_chat_goes_to_chat_completions(server):
    record = ask(url(server), Request((Message("user", "Hi there"),), 2))
    ((path, asked),) = server.asked
    assert path == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "user", "content": "Hi there"}]
    assert (record.text, record.usage.prompt_tokens) == ("w w ", 2)


def test_the_same_sweep_runs_against_it(server):
    async def main():
        async with OpenAITarget(url(server), "m") as target:
            source = PromptSource(0, await fit_words(target, 0))
            point = Point(20, 5, concurrency=2, rate=None, bounds=Bounds(6))
            return await Sweep(target, source, asyncio.Event()).measure(point)

    metrics = asyncio.run(main()).metrics
    assert (metrics.requests, metrics.errors) == (6, {})
    assert (metrics.avg_input_tokens, metrics.avg_output_tokens) == (20, 5)


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "INVALID_ARGUMENT"), (429, "RESOURCE_EXHAUSTED"), (503, "UNAVAILABLE"), (599, "HTTP_599")],
)
def test_a_refusal_has_the_code_that_a_device_would_give(server, status, code):
    server.answer = lambda asked: (status, ["not now"])
    error = ask(url(server), Request("x", 1)).error
    assert (error.code, error.message.strip(), error.retry_after_s) == (code, "not now", 3)


@pytest.mark.parametrize("line", ["data: {", "data: []", 'data: {"error": {"message": "out of memory"}}'])
def test_an_event_that_is_no_answer_is_a_failure(server, line):
    server.answer = lambda asked: (200, [line])
    assert ask(url(server), Request("x", 1)).error.code == "INTERNAL"


def test_a_server_that_is_not_there_ends_the_run(server):
    address = url(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(DeviceUnreachableError, match="cannot reach the server"):
        ask(address, Request("x", 1))
