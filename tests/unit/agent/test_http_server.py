"""What one client may take of the server: time, memory and connections, each within a bound."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

pytest.importorskip("uvicorn")

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edgellm_agent.access.caller import Caller, Role, current
from edgellm_agent.errors import PreconditionError
from edgellm_agent.http import server
from edgellm_agent.http.app import HANDLERS
from edgellm_agent.http.guard import Bodies, Guard
from edgellm_agent.http.server import HttpServer
from tests.support.http import ask, connection, free_port, http_server, read_to_end, request_bytes

SMALL = Bodies(max_bytes=1000, max_arriving_bytes=1500)


async def echo(request):
    return JSONResponse({"bytes": len(await SMALL.read(request))})


class Flood:
    """Answers with much more than a socket takes, and tells when that has ended."""

    def __init__(self):
        self.ended = asyncio.Event()

    async def __call__(self, request):
        return StreamingResponse(self.send())

    async def send(self):
        try:
            for _ in range(1000):
                yield bytes(1 << 16)
        finally:
            self.ended.set()


APP = Starlette(routes=[Route("/echo", echo, methods=["POST"])], exception_handlers=HANDLERS)


def to_end(port, *sent):
    """What a client gets that sends this and then only reads."""
    with connection(port) as opened:
        for data in sent:
            opened.sendall(data)
        return read_to_end(opened)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /echo HTTP/1.1\r\nhost: localhost\r\n",
        request_bytes("/echo", b"", content_length="10") + b"12345",
        # The second request on a connection has a time of its own.
        request_bytes("/echo", b"{}") + request_bytes("/echo", b"", content_length="10") + b"12345",
    ],
)
async def test_a_request_that_does_not_arrive_in_time_is_cut_off(monkeypatch, sent):
    monkeypatch.setattr(server, "ARRIVAL_S", 0.2)
    async with http_server(APP) as port:
        answer = await asyncio.to_thread(to_end, port, sent)
    assert answer.count(b"HTTP/1.1") == (1 if b"{}" in sent else 0)


async def test_a_request_that_dribbles_in_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "ARRIVAL_S", 0.3)

    def dribble(port):
        with connection(port) as opened:
            opened.sendall(request_bytes("/echo", b"", content_length="900"))
            try:
                # A byte at a time, each sooner than any timer between bytes would notice.
                for _ in range(900):
                    opened.sendall(b"x")
                    opened.settimeout(0.02)
                    try:
                        if opened.recv(1) == b"":
                            return True
                    except TimeoutError:
                        continue
            except OSError:
                return True
            return False

    async with http_server(APP) as port:
        assert await asyncio.to_thread(dribble, port)


async def test_the_time_begins_anew_with_each_request(monkeypatch):
    monkeypatch.setattr(server, "ARRIVAL_S", 0.5)

    def several(port):
        with connection(port) as opened:
            answers = 0
            # Together they take longer than one may.
            for _ in range(6):
                opened.sendall(request_bytes("/echo", b"", content_length="2") + b"{")
                opened.settimeout(0.15)
                with pytest.raises(TimeoutError):
                    opened.recv(1)
                opened.settimeout(20)
                opened.sendall(b"}")
                answers += read_answer(opened).startswith(b"HTTP/1.1 200")
            return answers

    async with http_server(APP) as port:
        assert await asyncio.to_thread(several, port) == 6


def read_answer(opened):
    """One answer of the echo."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += opened.recv(65536)
    return answer


async def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "READ_S", 0.2)
    flood = Flood()
    async with http_server(Starlette(routes=[Route("/flood", flood.__call__)])) as port:
        with connection(port) as opened:
            opened.sendall(b"GET /flood HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await asyncio.wait_for(flood.ended.wait(), 20)
            answer = await asyncio.to_thread(read_to_end, opened)
    assert 0 < len(answer) < 1000 << 16


async def test_a_body_has_a_bound_announced_or_not():
    chunked = b"POST /echo HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    async with http_server(APP) as port:
        assert (await asyncio.to_thread(ask, port, "/echo", bytes(1000))).json == {"bytes": 1000}
        assert (await asyncio.to_thread(ask, port, "/echo", bytes(1001))).status == 413
        with connection(port) as opened:
            opened.sendall(chunked + b"3e9\r\n" + bytes(1001) + b"\r\n0\r\n\r\n")
            assert (await asyncio.to_thread(opened.recv, 65536)).startswith(b"HTTP/1.1 413")


async def test_all_arriving_bodies_together_have_a_bound():
    async with http_server(APP) as port:
        with connection(port) as first:
            first.sendall(request_bytes("/echo", b"", content_length="1000") + bytes(999))
            await arrived(999)
            refused = await asyncio.to_thread(ask, port, "/echo", bytes(600))
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert (await asyncio.to_thread(ask, port, "/echo", bytes(400))).status == 200
            first.sendall(b"1")
            assert (await asyncio.to_thread(first.recv, 65536)).startswith(b"HTTP/1.1 200")
        assert SMALL.arriving_bytes == 0


async def test_what_was_arriving_when_a_client_left_counts_no_more():
    async with http_server(APP) as port:
        with connection(port) as opened:
            opened.sendall(request_bytes("/echo", b"", content_length="1000") + bytes(999))
            await arrived(999)
        await arrived(0)


async def arrived(count):
    async def poll():
        while SMALL.arriving_bytes != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 20)


async def test_headers_have_a_bound():
    async with http_server(APP) as port:
        request = b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * 40_000
        answer = await asyncio.to_thread(to_end, port, request)
    assert answer == b"" or b"invalid_http" in answer


async def test_what_is_no_http_is_told_so_in_json():
    async with http_server(APP) as port:
        answer = await asyncio.to_thread(to_end, port, b"hello\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_http"


async def test_beyond_the_connections_it_is_503_and_beyond_twice_it_is_nothing():
    async with http_server(APP, max_connections=1) as port:
        with connection(port) as first, connection(port) as second:
            second.sendall(request_bytes("/echo", b"{}"))
            refused = await asyncio.to_thread(read_to_end, second)
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"overloaded" in refused
            with connection(port) as third:
                assert await asyncio.to_thread(to_end, port) == b""
                third.close()
            first.sendall(request_bytes("/echo", b"{}"))
            assert (await asyncio.to_thread(first.recv, 65536)).startswith(b"HTTP/1.1 200")


async def test_a_taken_port_is_an_error_that_names_it():
    async with http_server(APP) as port:
        with pytest.raises(PreconditionError, match=f"127.0.0.1:{port}"):
            await HttpServer(APP, f"127.0.0.1:{port}", 1).start()


async def test_a_stop_waits_for_what_runs_and_takes_nothing_new():
    go, running = asyncio.Event(), asyncio.Event()

    async def slow(request):
        running.set()
        await go.wait()
        return JSONResponse({})

    port = free_port()
    slow_server = HttpServer(Starlette(routes=[Route("/slow", slow)]), f"127.0.0.1:{port}", 4)
    await slow_server.start()
    asked = asyncio.create_task(asyncio.to_thread(ask, port, "/slow"))
    with connection(port) as idle:
        await running.wait()
        stopping = asyncio.create_task(slow_server.stop(20))
        # The idle one is closed at once, which also tells that the stop has begun.
        assert await asyncio.to_thread(idle.recv, 1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        go.set()
        assert (await asked).status == 200
        await stopping


async def test_a_stop_takes_no_request_that_has_not_arrived(caplog):
    port = free_port()
    stopped = HttpServer(APP, f"127.0.0.1:{port}", 4)
    await stopped.start()
    with connection(port) as opened:
        opened.sendall(request_bytes("/echo", b"", content_length="1000") + bytes(999))
        await arrived(999)
        await stopped.stop(20)
        assert await asyncio.to_thread(read_to_end, opened) == b""
    assert "Exception" not in caplog.text


class TestGuard:
    @pytest.fixture
    async def port(self):
        async with http_server(Guard(Starlette(routes=APP.routes), lambda: "key")) as port:
            yield port

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST:1"])
    async def test_this_machines_names_are_taken(self, port, host):
        assert (await asyncio.to_thread(ask, port, "/echo", b"{}", host=host)).status == 200

    @pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "[::1", "192.168.1.5", ""])
    async def test_a_page_that_was_pointed_here_is_refused(self, port, host):
        assert (await asyncio.to_thread(ask, port, "/echo", b"{}", host=host)).status == 403

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
    async def test_a_form_is_refused(self, port, kind):
        assert (await asyncio.to_thread(ask, port, "/echo", b"{}", content_type=kind)).status == 415

    @pytest.mark.parametrize("given", ["Bearer wrong", "key", "Basic key", "Bearer", "Bearer kéy", ""])
    async def test_below_v1_the_key_is_asked_for(self, port, given):
        reply = await asyncio.to_thread(ask, port, "/v1/x", authorization=given)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")

    async def test_what_it_lets_through_is_asked_by_an_app(self):
        seen = []

        async def note(request):
            seen.append(current())
            return Response()

        app = Starlette(routes=[Route("/v1/note", note)])
        async with http_server(Guard(app, lambda: "key")) as port:
            await asyncio.to_thread(ask, port, "/v1/note", authorization="Bearer key")
        assert seen == [Caller("http", Role.APP)]

    async def test_the_key_opens(self, port):
        assert (await asyncio.to_thread(ask, port, "/v1/x", authorization="Bearer key")).status == 404


async def test_a_body_that_breaks_off_while_its_answer_is_made_is_no_error_of_ours(caplog):
    broken = request_bytes("/nowhere", b"5\r\n{}   \r\n1\r\n\r\nno chunk\r\n", transfer_encoding="chunked")
    async with http_server(APP) as port:
        answer = await asyncio.to_thread(to_end, port, broken)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))
    assert not [record for record in caplog.records if record.exc_info]
