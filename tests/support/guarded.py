"""The agent's gRPC server with nothing behind its methods but a note of who reached them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from edgellm.v1 import device_pb2, engines_pb2, inference_pb2, trust_pb2
from edgellm_agent.access import rules
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.caller import Caller, current
from edgellm_agent.access.certificates import Certificates
from edgellm_agent.access.settings import AccessSettings, TlsSettings
from edgellm_agent.services.server import Server
from tests.support.access_pki import Files
from tests.support.http import free_port

FILES = (inference_pb2, engines_pb2, device_pb2, trust_pb2, health_pb2, reflection_pb2)
METHODS: dict[str, MethodDescriptor] = {
    rules.short_name(f"/{service.full_name}/{method.name}"): method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
REACHED = "nothing is behind this method"


@dataclass
class Behind:
    """Servicers of all our services; each call that reaches one is noted and ends with UNAVAILABLE."""

    reached: list[tuple[str, Caller]] = field(default_factory=list)
    hold: asyncio.Event | None = None
    """Set by a test that wants calls to stay until it is set."""

    def __getattr__(self, name: str):
        async def method(request, context):
            # What the method starts answers the same caller.
            caller = await asyncio.create_task(_current())
            self.reached.append((name, caller))
            if self.hold is not None:
                await self.hold.wait()
            await context.abort(grpc.StatusCode.UNAVAILABLE, REACHED)

        if name.startswith("_"):
            raise AttributeError(name)
        return method

    async def close(self) -> None:
        pass


async def _current() -> Caller:
    return current()


@dataclass
class Guarded:
    """A running server."""

    socket: Path
    port: int
    behind: Behind
    audit: AuditLog
    server: Server

    def channel(self, files: Files | None = None) -> grpc.aio.Channel:
        """Over TLS with a certificate, or to the socket without."""
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        if files is None:
            return grpc.aio.insecure_channel(f"unix:{self.socket}", options=options)
        return grpc.aio.secure_channel(f"localhost:{self.port}", files.channel_credentials(), options=options)

    async def records(self) -> list[tuple[str, str, str, str, str]]:
        """What the audit log has."""
        found = await self.audit.last(1000)
        return [(r.caller, r.role, r.method, r.subject, r.outcome) for r in found]


@asynccontextmanager
async def guarded(
    folder: Path, tls: TlsSettings | None = None, port: int = 0, **access: object
) -> AsyncIterator[Guarded]:
    audit = AuditLog(folder / "audit")
    await audit.start()
    behind = Behind()
    certificates = None if tls is None else Certificates(tls)
    server = Server(
        behind,
        behind,
        behind,
        behind,
        access=AccessSettings(**access),
        certificates=certificates,
        audit=audit,
    )
    port = port or free_port()
    try:
        await server.start(folder / "a.sock", None if tls is None else f"127.0.0.1:{port}")
        yield Guarded(folder / "a.sock", port, behind, audit, server)
    finally:
        await server.stop(0)
        await audit.close()


async def call(channel: grpc.aio.Channel, name: str, request: object = None, timeout_s: float = 10.0):
    """Calls a method by its name in the table of rules; returns the error it ended with, or None."""
    method = METHODS[name]
    kind = message_factory.GetMessageClass(method.input_type)
    path = f"/{method.containing_service.full_name}/{method.name}"
    request = kind() if request is None else request
    make = getattr(
        channel,
        f"{'stream' if method.client_streaming else 'unary'}_"
        f"{'stream' if method.server_streaming else 'unary'}",
    )
    answer = message_factory.GetMessageClass(method.output_type).FromString
    callable_ = make(path, kind.SerializeToString, answer)
    given = _once(request) if method.client_streaming else request
    try:
        if method.server_streaming:
            async for _ in callable_(given, timeout=timeout_s):
                break
        else:
            await callable_(given, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def _once(request):
    yield request
