"""The Unix socket that clients see. It knows who connects, which gRPC does not tell.

gRPC has no way to ask a connection for its peer's credentials, nor to take a connection that somebody else
accepted; all that it tells of a peer is the address that its socket is bound to, and clients bind theirs to
none. So clients connect here. Each connection goes on to gRPC's own socket, which lies in a folder that only
the agent may enter, from a socket bound to a random name: by that name a call's user is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from edgellm_agent.access.users import Peer, read_peer
from edgellm_agent.errors import PreconditionError

log = logging.getLogger(__name__)

# Group members may connect; nobody else.
_SOCKET_MODE = 0o660
_BACKLOG = 128
# A Unix socket holds about 200 KiB. One buffer for all: what is in it is sent before the next read.
_BUFFER = memoryview(bytearray(256 << 10))
# The kernel's usual bound; with its default, large pushes lose a tenth of their speed here.
_SEND_BUFFER_BYTES = 212_992
# Whoever takes nothing for so long is gone; gRPC's own keepalive cannot see past this relay.
STALL_S = 60.0
# When one side has closed, the other gets so long.
LINGER_S = 10.0
# When the process has no file descriptor left.
_PAUSE_S = 1.0
# sun_path, with its last zero.
_MAX_PATH_BYTES = 107


class Relay:
    """Listens, and carries bytes between clients and gRPC.

    Args:
        path: The socket that clients connect to.
        max_connections: Of all users; admins are let in above it.
        max_per_user: Of one user. An admin's newest one is let in, and its quietest one is closed.
        is_admin: Whether a user id is an admin's.
    """

    def __init__(
        self, path: Path, max_connections: int, max_per_user: int, is_admin: Callable[[int], bool]
    ) -> None:
        self._path = path
        self._max_connections = max_connections
        self._max_per_user = max_per_user
        self._is_admin = is_admin
        self._listener: socket.socket | None = None
        self._connections: dict[str, _Connection] = {}
        self._per_user: Counter[int] = Counter()
        self._refused = 0

    @property
    def upstream(self) -> Path:
        """The socket of gRPC itself."""
        return self._path.with_name(f"{self._path.name}.d") / "s"

    def prepare(self) -> None:
        """Makes the folder for gRPC's own socket; raises PreconditionError if it cannot be ours alone."""
        if len(os.fsencode(self.upstream)) > _MAX_PATH_BYTES:
            longest = _MAX_PATH_BYTES - len(".d/s")
            raise PreconditionError(f"socket: the path may have {longest} bytes: {self._path}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(self._path)
        folder = self.upstream.parent
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PreconditionError(f"{folder} belongs to somebody else; choose another `socket`")
        folder.chmod(0o700)
        self.upstream.unlink(missing_ok=True)

    def start(self) -> None:
        """Listens; raises OSError."""
        listener = socket.socket(socket.AF_UNIX)
        # The socket must never be open to others, not even before chmod could close it.
        old_mask = os.umask(0o777 & ~_SOCKET_MODE)
        try:
            listener.bind(str(self._path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(old_mask)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        self._listen()

    def peer(self, name: str) -> Peer | None:
        """Who is behind a name that gRPC sees; None if nobody came that way."""
        connection = self._connections.get(name)
        return None if connection is None else connection.peer

    def refuse_new(self) -> None:
        """Takes no new connections; those that are open go on."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends all connections, and removes the sockets."""
        self.refuse_new()
        for connection in list(self._connections.values()):
            connection.close()
        with contextlib.suppress(OSError):
            self.upstream.unlink(missing_ok=True)
            self.upstream.parent.rmdir()

    def _listen(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        if self._listener is None:
            return
        loop = asyncio.get_running_loop()
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            # No descriptor is free: the connection stays where it is, and would wake us at once again.
            log.warning("access.cannot_accept error=%s", error)
            loop.remove_reader(self._listener)
            loop.call_later(_PAUSE_S, self._listen)
            return
        try:
            self._connect(client)
        except OSError as error:
            log.warning("access.connection_failed error=%s", error)
            client.close()

    def _connect(self, client: socket.socket) -> None:
        peer = read_peer(client)
        if self._is_admin(peer.uid):
            self._make_room(peer.uid)
        elif reason := self._too_many(peer.uid):
            self._refused += 1
            # Powers of two: whoever connects again and again does not fill the log.
            if self._refused & (self._refused - 1) == 0:
                log.warning("access.refused_connection uid=%d so_far=%d: %s", peer.uid, self._refused, reason)
            client.close()
            return
        name = f"edgellm-{secrets.token_hex(16)}"
        server = socket.socket(socket.AF_UNIX)
        try:
            server.bind(f"\0{name}")
            server.setblocking(False)
            # At once, or not at all: gRPC's backlog is full.
            server.connect(str(self.upstream))
            connection = _Connection(client, server, peer, lambda: self._forget(name, peer.uid))
        except OSError:
            server.close()
            raise
        self._per_user[peer.uid] += 1
        self._connections[name] = connection

    def _too_many(self, uid: int) -> str:
        if self._per_user[uid] >= self._max_per_user:
            return f"{self._max_per_user} connections of this user are open"
        if len(self._connections) >= self._max_connections:
            return f"{self._max_connections} connections are open"
        return ""

    def _make_room(self, uid: int) -> None:
        """An admin gets in whatever is open, its own forgotten connections included; these stay bounded."""
        if self._per_user[uid] >= self._max_per_user:
            own = [connection for connection in self._connections.values() if connection.peer.uid == uid]
            min(own, key=lambda connection: connection.moved_at).close()

    def _forget(self, name: str, uid: int) -> None:
        del self._connections[name]
        self._per_user[uid] -= 1
        if not self._per_user[uid]:
            del self._per_user[uid]


class _Connection:
    """A client's socket, ours to gRPC, and the bytes between them."""

    def __init__(
        self, client: socket.socket, server: socket.socket, peer: Peer, forget: Callable[[], None]
    ) -> None:
        self.peer = peer
        self._sockets = (client, server)
        self._forget = forget
        self._closed = False
        self._linger: asyncio.TimerHandle | None = None
        for end in self._sockets:
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._flows = (_Flow(client, server, self), _Flow(server, client, self))
        try:
            for flow in self._flows:
                flow.start()
        except OSError:
            for flow in self._flows:
                flow.stop()
            raise

    @property
    def moved_at(self) -> float:
        """When bytes last came from either side, by the loop's clock."""
        return max(flow.moved_at for flow in self._flows)

    def ended(self) -> None:
        """One direction has come to its end."""
        if all(flow.ended for flow in self._flows):
            self.close()
        elif self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.close)

    def close(self) -> None:
        """Ends both directions."""
        if self._closed:
            return
        self._closed = True
        if self._linger is not None:
            self._linger.cancel()
        for flow in self._flows:
            flow.stop()
        for end in self._sockets:
            end.close()
        self._forget()


class _Flow:
    """One direction. What its sink does not take at once waits here; meanwhile nothing more is read."""

    def __init__(self, source: socket.socket, sink: socket.socket, connection: _Connection) -> None:
        self.ended = False
        self._source = source
        self._sink = sink
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._rest = memoryview(b"")
        self._stall: asyncio.TimerHandle | None = None
        self.moved_at = self._loop.time()

    def start(self) -> None:
        """Moves bytes from now on; raises OSError."""
        self._loop.add_reader(self._source, self._read)

    def stop(self) -> None:
        """Moves no byte any more."""
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._sink)
        if self._stall is not None:
            self._stall.cancel()

    def _read(self) -> None:
        try:
            count = self._source.recv_into(_BUFFER)
            self.moved_at = self._loop.time()
            if count:
                sent = self._send(_BUFFER[:count])
                if sent < count:
                    self._wait(_BUFFER[sent:count])
            else:
                self._end()
        except BlockingIOError:
            pass
        except OSError:
            self._connection.close()

    def _send(self, data: memoryview) -> int:
        try:
            return self._sink.send(data)
        except BlockingIOError:
            return 0

    def _wait(self, rest: memoryview) -> None:
        self._rest = memoryview(bytes(rest))
        self._loop.remove_reader(self._source)
        self._loop.add_writer(self._sink, self._flush)
        self._watch()

    def _flush(self) -> None:
        try:
            self._rest = self._rest[self._send(self._rest) :]
        except OSError:
            self._connection.close()
            return
        self._watch()
        if not self._rest:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._read)

    def _watch(self) -> None:
        """Gives the sink time for what waits."""
        if self._stall is not None:
            self._stall.cancel()
        self._stall = self._loop.call_later(STALL_S, self._connection.close) if self._rest else None

    def _end(self) -> None:
        self.ended = True
        self._loop.remove_reader(self._source)
        self._sink.shutdown(socket.SHUT_WR)
        self._connection.ended()


def _clear_stale(path: Path) -> None:
    """Removes the socket of an agent that is gone; raises PreconditionError if one answers."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise PreconditionError(f"{path} is there and is no socket; choose another `socket`")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise PreconditionError(f"another agent answers on {path}; stop it first")
