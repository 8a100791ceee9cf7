"""The listener for scrapers: two paths, read only, from anywhere, within the bounds of the other server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from types import SimpleNamespace

import pydantic
import pytest

pytest.importorskip("uvicorn")

from prometheus_client.parser import text_string_to_metric_families

from edgellm_agent.http import server
from edgellm_agent.http.metrics import Metrics
from edgellm_agent.http.settings import MetricsSettings
from tests.support.http import ask, connection, http_server, read_to_end, request_bytes
from tests.support.telemetry_records import busy_totals, full_record


def app(state="serving", record=None):
    running = None if state == "none" else SimpleNamespace(state=state)
    return Metrics(
        SimpleNamespace(running=running, totals=busy_totals()), SimpleNamespace(latest=record)
    ).app()


async def test_metrics_are_the_record_and_the_histograms():
    async with http_server(app(record=full_record())) as port:
        reply = await asyncio.to_thread(ask, port, "/metrics")
    names = {family.name for family in text_string_to_metric_families(reply.body.decode())}
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert {"edgellm_energy_joules", "edgellm_time_to_first_token_seconds"} <= names


async def test_before_the_first_record_there_are_metrics_too():
    async with http_server(app()) as port:
        reply = await asyncio.to_thread(ask, port, "/metrics")
    assert reply.status == 200
    assert b"edgellm_power_watts" not in reply.body


@pytest.mark.parametrize(("state", "status"), [("serving", 200), ("restarting", 503), ("none", 503)])
async def test_it_is_healthy_while_the_engine_serves(state, status):
    async with http_server(app(state)) as port:
        reply = await asyncio.to_thread(ask, port, "/healthz")
    assert (reply.status, reply.json) == (status, {"state": state})


async def test_a_scraper_may_know_the_device_by_any_name():
    async with http_server(app()) as port:
        assert (await asyncio.to_thread(ask, port, "/metrics", host="robot-7.hall-2:9464")).status == 200


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/completions", "/metrics/"])
async def test_there_is_nothing_else(path):
    async with http_server(app()) as port:
        assert (await asyncio.to_thread(ask, port, path)).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_it_can_only_be_read(method):
    async with http_server(app()) as port:
        reply = await asyncio.to_thread(ask, port, "/metrics", {}, method=method)
    assert reply.status == 405


async def test_who_sends_a_body_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "ARRIVAL_S", 0.2)

    def send(port):
        with connection(port) as opened:
            try:
                opened.sendall(request_bytes("/metrics", b"", method="GET", content_length=str(1 << 40)))
                while True:
                    opened.sendall(bytes(1 << 16))
            except OSError:
                return True

    async with http_server(app()) as port:
        assert await asyncio.wait_for(asyncio.to_thread(send, port), 20)


async def test_who_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "READ_S", 0.2)
    # Watched on the server: a client whose window is shut may not take note of a reset for many seconds.
    cut = asyncio.Event()
    connection_lost = server.BoundedProtocol.connection_lost

    def lost(protocol, error):
        connection_lost(protocol, error)
        cut.set()

    monkeypatch.setattr(server.BoundedProtocol, "connection_lost", lost)

    def ask_and_never_read(opened):
        with contextlib.suppress(OSError):
            while True:
                opened.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100)

    async with http_server(app(record=full_record())) as port:
        with connection(port) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            asking = asyncio.create_task(asyncio.to_thread(ask_and_never_read, opened))
            await asyncio.wait_for(cut.wait(), 20)
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            await asking


async def test_too_many_at_once_are_told_so():
    async with http_server(app(), max_connections=1) as port:
        with connection(port), connection(port) as second:
            second.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await asyncio.to_thread(read_to_end, second)).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("listen", ["127.0.0.1:9464", "0.0.0.0:9464", "[::]:9464", "robot-7.hall-2:80"])
def test_its_address_may_be_any(listen):
    assert MetricsSettings(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["9464", ":9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "[]:1", "a:b"])
def test_an_address_needs_a_host_and_a_port(listen):
    with pytest.raises(pydantic.ValidationError, match=r"listen\n.*must be an address and a port"):
        MetricsSettings(listen=listen)


def test_by_default_only_this_machine_may_scrape():
    assert MetricsSettings().listen == "127.0.0.1:9464"
