"""The daemon: puts the parts together, runs until it is told to stop, and takes them apart in the opposite
order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

from edgellm_agent import parts
from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.config import AgentSettings
from edgellm_agent.desired.commands import Commands
from edgellm_agent.desired.controller import DesiredController
from edgellm_agent.events import Events
from edgellm_agent.governor.controller import GovernorLoop
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.logs import LogRing, recording
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.sd_notify import SystemdNotifier
from edgellm_agent.services.device import DeviceServicer, Identity
from edgellm_agent.services.engines import EngineServicer
from edgellm_agent.services.inference import InferenceServicer
from edgellm_agent.services.server import Server
from edgellm_agent.telemetry.detect import open_source
from edgellm_agent.telemetry.sampler import Sampler

if TYPE_CHECKING:
    from edgellm_agent.http.server import HttpServer

log = logging.getLogger(__name__)

_COMMAND_LINES = 200


async def run(settings: AgentSettings) -> None:
    """Runs the agent until SIGTERM or SIGINT; running requests then get `drain_s` to end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    notifier = SystemdNotifier()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(notifier.close)
        await stack.enter_async_context(running(settings))
        notifier.ready()
        await stop.wait()
        log.info("stopping")
        notifier.stopping()


@contextlib.asynccontextmanager
async def running(settings: AgentSettings) -> AsyncIterator[EngineManager]:
    """A running agent, for as long as the context lasts."""
    parts.check_files(settings)
    identity, events = Identity(settings.device, metadata.version("edgellm")), Events()
    trust = parts.trust(settings)
    manager = parts.manager(settings, events, trust)
    async with contextlib.AsyncExitStack() as stack:
        ring = stack.enter_context(recording())
        audit = AuditLog(settings.state_dir / "audit")
        await audit.start()
        stack.push_async_callback(audit.close)
        stack.push_async_callback(trust.close)
        stack.push_async_callback(manager.close)
        trust.start()
        source = open_source(settings.telemetry_source, settings.root)
        # Off the loop: a helper process may take a second to end.
        stack.push_async_callback(asyncio.to_thread, source.close)
        sampler = Sampler(
            source,
            manager.runtime,
            governor=lambda: governor.part() if governor is not None else None,
            uplink=lambda: uplink.part() if uplink is not None else None,
            interval_s=settings.telemetry_interval_s,
        )
        governor = parts.governor(settings, manager, sampler, events)
        uplink = parts.uplink(settings, identity, sampler)
        server = Server(
            InferenceServicer(manager),
            EngineServicer(manager),
            DeviceServicer(identity, manager, sampler, ring, audit),
            parts.trust_servicer(trust, manager),
            access=settings.access,
            certificates=parts.certificates(settings),
            audit=audit,
        )
        manager.on_change = _Changes(server, manager, governor, uplink).tell
        sampler.start()
        stack.push_async_callback(sampler.close)
        if governor is not None:
            governor.start()
            stack.push_async_callback(governor.close)
        if uplink is not None:
            events.listen(uplink.happened)
            stack.push_async_callback(uplink.close)
        # Before anybody can ask for another activation.
        manager.settle()
        # While the last requests run, the board is still governed, and the fleet still hears of it.
        await _listen(stack, settings, server, manager, sampler)
        # Sent away first: calls that watch would otherwise use up the grace of those that compute.
        stack.callback(ring.close)
        stack.callback(sampler.end_watching)
        if uplink is not None:
            # Not before the socket is ours: a second agent would take the first one's place at the broker.
            uplink.start()
        # In the background: the API answers, and a signal is obeyed, while a large engine loads.
        starting = asyncio.create_task(manager.start())
        starting.add_done_callback(_log_failure)
        stack.push_async_callback(_end, starting)
        scrubber = parts.scrubber(settings, manager)
        scrubber.start()
        stack.push_async_callback(scrubber.close)
        if uplink is not None:
            _obey(stack, settings, manager=manager, uplink=uplink, ring=ring, audit=audit)
        stack.callback(manager.leave)
        yield manager


@dataclass(frozen=True)
class _Changes:
    """Who must know that another engine runs, or that it is in another state."""

    server: Server
    manager: EngineManager
    governor: GovernorLoop | None
    uplink: MqttPublisher | None
    _telling: set[asyncio.Task[None]] = field(default_factory=set)

    def tell(self) -> None:
        """Tells them all; what takes time is done in the background."""
        engine = self.manager.running
        if self.governor is not None:
            self.governor.apply()
        if self.uplink is not None:
            self.uplink.update_state(active_engine="" if engine is None else engine.spec.digest)
        serving = engine is not None and engine.state == "serving"
        task = asyncio.create_task(self.server.set_inference(serving=serving))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)


async def _listen(
    stack: contextlib.AsyncExitStack,
    settings: AgentSettings,
    server: Server,
    manager: EngineManager,
    sampler: Sampler,
) -> None:
    """Opens all that listens; it is closed together."""
    listening: list[Server | HttpServer] = []
    stack.push_async_callback(_stop, listening, settings.drain_s)
    await server.start(settings.socket, settings.listen)
    listening.append(server)
    if settings.http is not None:
        http = parts.http_server(settings.http, manager, sampler, settings.access)
        await http.start()
        listening.append(http)
    if settings.metrics is not None:
        metrics = parts.metrics_server(settings.metrics, manager, sampler)
        await metrics.start()
        listening.append(metrics)


def _obey(
    stack: contextlib.AsyncExitStack,
    settings: AgentSettings,
    *,
    manager: EngineManager,
    uplink: MqttPublisher,
    ring: LogRing,
    audit: AuditLog,
) -> None:
    """Does what the fleet desires, and the commands that the settings list."""
    fleet = Fleet("operator" if settings.mqtt is None else settings.mqtt.role, audit)
    desired = DesiredController(settings.desired, manager, uplink, fleet)

    async def report() -> str:
        desired.publish(again=True)
        return ""

    async def restart() -> str:
        await manager.restart()
        return ""

    async def logs() -> str:
        lines = [line async for line in ring.read(_COMMAND_LINES)]
        return "\n".join(
            f"{line.time.ToJsonString()} {line.level} {line.logger} {line.text}" for line in lines
        )

    commands = Commands(
        settings.commands, {"report": report, "restart-engine": restart, "logs": logs}, uplink, fleet
    )
    for part in (desired, commands):
        part.start()
        stack.push_async_callback(part.close)


async def _stop(servers: list[Server | HttpServer], grace_s: float) -> None:
    """All at once: they share the time that running requests get."""
    await asyncio.gather(*(server.stop(grace_s) for server in servers))


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the active engine does not start", exc_info=task.exception())


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
