"""The agent's HTTP API as tests speak to it: raw bytes where a well-behaved client would be in the way."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPConnection

from starlette.types import ASGIApp

from edgellm_agent.http.server import HttpServer
from tests.support.agents import Agent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def http_settings(port: int, **options: object) -> str:
    """Lines of an agent's TOML file."""
    if not options.keys() & {"api_key", "api_key_file"}:
        options["open"] = True
    lines = [f'[http]\nlisten = "127.0.0.1:{port}"']
    lines += [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    return "\n".join(lines)


def port_of(agent: Agent) -> int:
    (line,) = [line for line in agent.settings.splitlines() if line.startswith('listen = "127.0.0.1:')]
    return int(line.rpartition(":")[2].strip('"'))


def request_bytes(path: str, body: bytes, *, method: str = "POST", **headers: str) -> bytes:
    lines = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@contextmanager
def connection(port: int, timeout_s: float = 20.0):
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as opened:
        yield opened


def read_to_end(opened: socket.socket) -> bytes:
    """All until the server closes."""
    pieces = []
    try:
        while piece := opened.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json["error"]


def ask(port: int, path: str, body: object = None, *, method: str = "", **headers: str) -> Reply:
    """One request with a client that refuses nothing; a body makes it a POST of JSON."""
    method = method or ("GET" if body is None else "POST")
    payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {} if body is None else {"content-type": "application/json"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(HTTPConnection("127.0.0.1", port, timeout=20)) as http:
        http.request(method, path, payload, named)
        response = http.getresponse()
        return Reply(response.status, response.headers, response.read())


def events(body: bytes) -> list[str]:
    """Data of server-sent events."""
    return [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]


@asynccontextmanager
async def http_server(app: ASGIApp, max_connections: int = 64) -> AsyncIterator[int]:
    """A server in this process; gives its port."""
    port = free_port()
    server = HttpServer(app, f"127.0.0.1:{port}", max_connections)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)
