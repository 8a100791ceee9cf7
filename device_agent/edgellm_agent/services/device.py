"""DeviceService: what the device is, how its memory is divided, how it feels, what its agent logs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import psutil

from edgellm.bundle.config import EngineConfig
from edgellm.v1 import device_pb2, device_pb2_grpc
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.caller import current
from edgellm_agent.errors import DataLossError, InvalidError
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.logs import LEVELS, LogRing
from edgellm_agent.services import status
from edgellm_agent.telemetry.sampler import Sampler

_SHORTEST_INTERVAL_S = 0.1
_LONGEST_INTERVAL_S = 3600.0
_LOG_LINES = 100
_AUDIT_RECORDS = 100


@dataclass(frozen=True)
class Identity:
    """What does not change while the agent runs."""

    device: str
    agent_version: str


class DeviceServicer(device_pb2_grpc.DeviceServiceServicer):
    """Info, memory plan, telemetry, log, audit log."""

    def __init__(
        self,
        identity: Identity,
        manager: EngineManager,
        sampler: Sampler,
        ring: LogRing,
        audit: AuditLog,
    ) -> None:
        self._identity = identity
        self._manager = manager
        self._sampler = sampler
        self._ring = ring
        self._audit = audit

    @status.unary
    async def GetInfo(
        self,
        request: device_pb2.GetInfoRequest,
        context: status.Context,
    ) -> device_pb2.GetInfoResponse:
        policy = self._manager.policy
        memory = policy.memory
        return device_pb2.GetInfoResponse(
            device=self._identity.device,
            agent_version=self._identity.agent_version,
            profile=memory.profile.name,
            simulated=memory.simulated,
            runtimes=[device_pb2.RuntimeInfo(name=n, version=v) for n, v in policy.runtimes.items()],
            memory_total_bytes=psutil.virtual_memory().total,
            memory_available_bytes=self._manager.available_bytes(),
            disk_free_bytes=self._manager.store.free_bytes(),
            active_engine=self._manager.active_digest() or "",
        )

    @status.unary
    async def GetMemoryPlan(
        self,
        request: device_pb2.GetMemoryPlanRequest,
        context: status.Context,
    ) -> device_pb2.GetMemoryPlanResponse:
        if request.config:
            try:
                config = EngineConfig.from_json(request.config)
            except ValueError as error:
                raise InvalidError("config", str(error).replace("\n", " ")) from None
            plan = self._manager.plan_for(config)
        else:
            plan = self._manager.engine_for("").plan
        return device_pb2.GetMemoryPlanResponse(plan=plan.to_proto())

    @status.stream
    async def WatchTelemetry(
        self,
        request: device_pb2.WatchTelemetryRequest,
        context: status.Context,
    ) -> AsyncGenerator[device_pb2.WatchTelemetryResponse, None]:
        interval_s = request.interval_s or 1.0
        if not _SHORTEST_INTERVAL_S <= interval_s <= _LONGEST_INTERVAL_S:
            what = f"must lie between {_SHORTEST_INTERVAL_S} and {_LONGEST_INTERVAL_S:.0f}, not {interval_s}"
            raise InvalidError("interval_s", what)
        async for record in self._sampler.watch(interval_s):
            yield device_pb2.WatchTelemetryResponse(telemetry=record)

    @status.stream
    async def WatchLogs(
        self,
        request: device_pb2.WatchLogsRequest,
        context: status.Context,
    ) -> AsyncGenerator[device_pb2.WatchLogsResponse, None]:
        lines, level = request.lines or _LOG_LINES, request.level or "INFO"
        if lines > self._ring.max_lines:
            raise InvalidError("lines", f"at most {self._ring.max_lines} are kept, not {lines}")
        if level not in LEVELS:
            raise InvalidError("level", f"must be one of {', '.join(LEVELS)}, not {level!r:.40}")
        async with aclosing(self._ring.read(lines, LEVELS[level], follow=request.follow)) as found:
            async for line in found:
                yield device_pb2.WatchLogsResponse(line=line)

    @status.unary
    async def WhoAmI(
        self,
        request: device_pb2.WhoAmIRequest,
        context: status.Context,
    ) -> device_pb2.WhoAmIResponse:
        caller = current()
        return device_pb2.WhoAmIResponse(caller=caller.name, role=str(caller.role))

    @status.stream
    async def ReadAudit(
        self,
        request: device_pb2.ReadAuditRequest,
        context: status.Context,
    ) -> AsyncGenerator[device_pb2.ReadAuditResponse, None]:
        limit = request.limit or _AUDIT_RECORDS
        try:
            records = await self._audit.last(limit)
        except OSError as error:
            raise DataLossError(f"the audit log cannot be read: {error}") from None
        for record in records:
            yield device_pb2.ReadAuditResponse(record=record)
        # Whoever reads shall know whether it can be believed, and have what there is.
        await self._audit.verify()
