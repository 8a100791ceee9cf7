"""A server of files with ranges, over HTTP or TLS, that goes wrong in the ways that it is told to."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Answer:
    """An answer as it would be sent; a wrong turn changes it before it is."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut_after: int | None = None
    """Bytes of the body after which the connection is dropped."""
    stall_after: int | None = None
    """Bytes of the body after which nothing more is sent until the server is released."""
    trickle: bool = False
    """Whether the body comes byte by byte, 50 a second, until the server is released."""


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    path: str
    headers: dict[str, str]

    @property
    def offset(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else 0


Turn = Callable[[Asked, Answer], Answer]


@dataclass
class RangeServer:
    """Serves what is below `root`; `turns` are taken one per request, then all goes well."""

    root: Path
    port: int = 0
    tls: bool = False
    ranges: bool = True
    etags: bool = True
    always: Turn | None = None
    turns: list[Turn] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    """Path → bytes of bodies that were sent."""
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://localhost:{self.port}"

    def answer(self, asked: Asked) -> Answer:
        path = self.root / asked.path.partition("?")[0].lstrip("/")
        answer = self._file(path, asked) if path.is_file() else Answer(404, {}, b"not here")
        if self.always is not None:
            answer = self.always(asked, answer)
        return self.turns.pop(0)(asked, answer) if self.turns else answer

    def _file(self, path: Path, asked: Asked) -> Answer:
        data, etag = path.read_bytes(), f'"{path.name[:16]}"'
        headers = {"ETag": etag} if self.etags else {}
        stale = asked.headers.get("if-range", etag) != etag
        if not self.ranges or "range" not in asked.headers or stale:
            return Answer(200, headers, data)
        if asked.offset >= len(data):
            return Answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        headers["Content-Range"] = f"bytes {asked.offset}-{len(data) - 1}/{len(data)}"
        return Answer(206, headers, data[asked.offset :])


def _handler(server: RangeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body are two writes: the second would wait 40 ms for an acknowledgement of the first.
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = Asked(self.path, {name.lower(): value for name, value in self.headers.items()})
            server.asked.append(asked)
            answer = server.answer(asked)
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self._send(answer)

        def _send(self, answer: Answer) -> None:
            if answer.trickle:
                for byte in answer.body:
                    self.wfile.write(bytes([byte]))
                    if server.released.wait(0.02):
                        return
            bounds = [end for end in (answer.cut_after, answer.stall_after) if end is not None]
            body = answer.body[: min(bounds, default=len(answer.body))]
            for start in range(0, len(body), 65_536):
                piece = body[start : start + 65_536]
                self.wfile.write(piece)
                server.sent[self.path] = server.sent.get(self.path, 0) + len(piece)
            if answer.stall_after is not None:
                self.wfile.flush()
                server.stalled.set()
                server.released.wait(60)
            if bounds:
                self.close_connection = True

    return Handler


class _Threads(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away is what these tests are about."""


@contextlib.contextmanager
def range_server(root: Path, tls: ssl.SSLContext | None = None, port: int = 0) -> Iterator[RangeServer]:
    """A server on a free port of localhost for as long as the context lasts."""
    server = RangeServer(root, tls=tls is not None)
    http = _Threads(("127.0.0.1", port), _handler(server))
    if tls is not None:
        http.socket = tls.wrap_socket(http.socket, server_side=True)
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
        thread.join(5)
