"""The gRPC server: our services, health and reflection, on a Unix socket and, with TLS, on a port."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edgellm.v1 import (
    device_pb2,
    device_pb2_grpc,
    engines_pb2,
    engines_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    trust_pb2,
    trust_pb2_grpc,
)
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.callers import Callers
from edgellm_agent.access.interceptor import AccessInterceptor
from edgellm_agent.access.limits import Limits
from edgellm_agent.access.relay import Relay
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.access.users import Users
from edgellm_agent.errors import PreconditionError
from edgellm_agent.services.device import DeviceServicer
from edgellm_agent.services.engines import EngineServicer
from edgellm_agent.services.inference import InferenceServicer

if TYPE_CHECKING:
    # An agent without a port shall not pay for its libraries.
    from edgellm_agent.access.certificates import Certificates

log = logging.getLogger(__name__)

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_ENGINES = engines_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
_DEVICE = device_pb2.DESCRIPTOR.services_by_name["DeviceService"].full_name
_TRUST = trust_pb2.DESCRIPTOR.services_by_name["TrustService"].full_name

# Of all callers; each alone is held to less.
_MAX_CALLS = 1024
# Blobs come in chunks of at most 1 MiB; a prompt may be as long as gRPC's own limit of 4 MiB allows.
_OPTIONS = (
    # A client that is gone without a word is found out within 80 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Without it, 60 s, whatever the line before says.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients ask every 20 s while a call waits.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # One without a call is told to go; a client library opens another when it needs one.
    ("grpc.max_connection_idle_ms", 600_000),
    # What TLS, and the first words of HTTP/2, may take.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 256),
    # A second agent on the same port shall fail, not share it.
    ("grpc.so_reuseport", 0),
)


class Server:
    """The server and its sockets; health follows the engine.

    Args:
        inference: Text generation.
        engines: Push, activate, remove.
        device: The device itself.
        trust: Whose signatures count; None where the agent has no such thing.
        access: Who may do what.
        certificates: For the port; None where there is none.
        audit: Takes what is done and refused.
    """

    def __init__(
        self,
        inference: InferenceServicer,
        engines: EngineServicer,
        device: DeviceServicer,
        trust: trust_pb2_grpc.TrustServiceServicer | None,
        *,
        access: AccessSettings,
        certificates: Certificates | None,
        audit: AuditLog,
    ) -> None:
        self._inference = inference
        self._engines = engines
        self._device = device
        self._trust = trust
        self._access = access
        self._certificates = certificates
        self._audit = audit
        self._names = [_INFERENCE, _ENGINES, _DEVICE, *([] if trust is None else [_TRUST])]
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._relay: Relay | None = None

    async def start(self, path: Path, listen: str | None) -> None:
        """Listens; raises PreconditionError when another agent has the socket or the port is taken."""
        if listen is not None and self._certificates is None:
            raise PreconditionError(f"{listen} would be open to whoever can reach it; it needs [tls]")
        users = Users(self._access)
        limits = self._access.max_connections, self._access.max_connections_per_user
        relay = self._relay = Relay(path, *limits, users.is_admin)
        relay.prepare()
        server = self._server = self._make(Callers(users, relay, self._certificates))
        try:
            server.add_insecure_port(f"unix:{relay.upstream}")
            if listen is not None and self._certificates is not None:
                server.add_secure_port(listen, self._certificates.credentials())
            await server.start()
            relay.start()
        except (RuntimeError, OSError) as error:
            relay.close()
            await server.stop(0)
            where = f"{path} or {listen}" if listen else str(path)
            raise PreconditionError(
                f"cannot listen on {where}: {error}; choose another `socket` or `listen`, or stop who has it"
            ) from None
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self.set_inference(serving=False)
        log.info("listening on %s%s", path, f" and, with TLS, {listen}" if listen else "")

    async def set_inference(self, *, serving: bool) -> None:
        """Tells health checks whether requests for text would be answered."""
        state = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set(_INFERENCE, state)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives the running ones so long, and removes the socket."""
        await self._health.enter_graceful_shutdown()
        if self._relay is not None:
            self._relay.refuse_new()
        if self._server is not None:
            await self._server.stop(grace_s)
        await self._engines.close()
        if self._relay is not None:
            self._relay.close()

    def _make(self, callers: Callers) -> grpc.aio.Server:
        guard = AccessInterceptor(callers, Limits(self._access), self._audit)
        server = grpc.aio.server(interceptors=[guard], options=_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._inference, server)
        engines_pb2_grpc.add_EngineServiceServicer_to_server(self._engines, server)
        device_pb2_grpc.add_DeviceServiceServicer_to_server(self._device, server)
        if self._trust is not None:
            trust_pb2_grpc.add_TrustServiceServicer_to_server(self._trust, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return server
