"""The gRPC server: our three services, health and reflection, on a Unix socket and, only when told, on
loopback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from pathlib import Path

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
)
from edgellm_agent.errors import PreconditionError
from edgellm_agent.services.device import DeviceServicer
from edgellm_agent.services.engines import EngineServicer
from edgellm_agent.services.inference import InferenceServicer

log = logging.getLogger(__name__)

# Group members may connect; nobody else.
_SOCKET_MODE = 0o660
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_NAMES = (
    _INFERENCE,
    engines_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name,
    device_pb2.DESCRIPTOR.services_by_name["DeviceService"].full_name,
)


class Server:
    """The server and its socket; health follows the engine."""

    def __init__(self, inference: InferenceServicer, engines: EngineServicer, device: DeviceServicer) -> None:
        self._engines = engines
        self._health = health.aio.HealthServicer()
        # Blobs come in chunks of at most 1 MiB; a prompt may be as long as gRPC's own limit of 4 MiB allows.
        self._server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        engines_pb2_grpc.add_EngineServiceServicer_to_server(engines, self._server)
        device_pb2_grpc.add_DeviceServiceServicer_to_server(device, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._socket: Path | None = None

    async def start(self, path: Path, tcp: str | None) -> None:
        """Listens; raises PreconditionError when another agent has the socket or the port is taken."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(path)
        # The socket must never be open to others, not even before chmod could close it.
        old_mask = os.umask(0o777 & ~_SOCKET_MODE)
        try:
            self._server.add_insecure_port(f"unix:{path}")
            if tcp is not None:
                self._server.add_insecure_port(tcp)
            await self._server.start()
        except RuntimeError as error:
            where = f"{path} or {tcp}" if tcp else str(path)
            raise PreconditionError(
                f"cannot listen on {where}: {error}; choose another `socket` or `listen`, or stop who has it"
            ) from None
        finally:
            os.umask(old_mask)
        self._socket = path
        for name in ("", *_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self.set_inference(serving=False)
        log.info("listening on %s%s", path, f" and {tcp}" if tcp else "")

    async def set_inference(self, *, serving: bool) -> None:
        """Tells health checks whether requests for text would be answered."""
        state = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set(_INFERENCE, state)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives the running ones so long, and removes the socket."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self._engines.close()
        if self._socket is not None:
            with contextlib.suppress(FileNotFoundError):
                self._socket.unlink()


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
