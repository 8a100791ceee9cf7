"""The daemon: puts the parts together, runs until it is told to stop, and takes them apart in the opposite
order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import signal
from collections.abc import AsyncIterator
from importlib import metadata
from typing import TYPE_CHECKING

from edgellm.profiles import load_profile
from edgellm_agent.config import AgentSettings, HttpSettings
from edgellm_agent.engine.supervisor import Serving
from edgellm_agent.http.settings import MetricsSettings
from edgellm_agent.lifecycle import EngineManager, Policy
from edgellm_agent.logs import recording
from edgellm_agent.memory import MemoryPolicy
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.registry import Registry
from edgellm_agent.services.device import DeviceServicer, Identity
from edgellm_agent.services.engines import EngineServicer
from edgellm_agent.services.inference import InferenceServicer
from edgellm_agent.services.server import Server
from edgellm_agent.store import Store
from edgellm_agent.telemetry.detect import open_source
from edgellm_agent.telemetry.sampler import Sampler

if TYPE_CHECKING:
    from edgellm_agent.http.server import HttpServer

log = logging.getLogger(__name__)

# Distributions that bring the onnxruntime module.
_ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


async def run(settings: AgentSettings) -> None:
    """Runs the agent until SIGTERM or SIGINT; running requests then get `drain_s` to end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings):
        await stop.wait()
        log.info("stopping")


@contextlib.asynccontextmanager
async def running(settings: AgentSettings) -> AsyncIterator[EngineManager]:
    """A running agent, for as long as the context lasts."""
    identity = Identity(settings.device, metadata.version("edgellm"))
    manager = _manager(settings)
    async with contextlib.AsyncExitStack() as stack:
        ring = stack.enter_context(recording())
        stack.push_async_callback(manager.close)
        source = open_source(settings.telemetry_source, settings.root)
        # Off the loop: a helper process may take a second to end.
        stack.push_async_callback(asyncio.to_thread, source.close)
        sampler = Sampler(source, manager.runtime, interval_s=settings.telemetry_interval_s)
        server = Server(
            InferenceServicer(manager),
            EngineServicer(manager),
            DeviceServicer(identity, manager, sampler, ring),
        )
        listening: list[Server | HttpServer] = []
        stack.push_async_callback(_stop, listening, settings.drain_s)
        await server.start(settings.socket, settings.listen)
        listening.append(server)
        if settings.http is not None:
            http = _http_server(settings.http, manager, sampler)
            await http.start()
            listening.append(http)
        if settings.metrics is not None:
            metrics = _metrics_server(settings.metrics, manager, sampler)
            await metrics.start()
            listening.append(metrics)
        # Closed before the server stops: calls that watch telemetry would otherwise use up its grace.
        sampler.start()
        stack.push_async_callback(sampler.close)
        stack.callback(ring.close)
        publisher = _publisher(settings, identity, sampler)
        if publisher is not None:
            publisher.start()
            stack.push_async_callback(publisher.close)

        async def tell() -> None:
            serving = manager.running is not None and manager.running.state == "serving"
            await server.set_inference(serving=serving)
            if publisher is not None:
                publisher.update_state(active_engine=manager.running.spec.digest if manager.running else "")

        changes: set[asyncio.Task[None]] = set()

        def on_change() -> None:
            task = asyncio.create_task(tell())
            changes.add(task)
            task.add_done_callback(changes.discard)

        manager.on_change = on_change
        # In the background: the API answers, and a signal is obeyed, while a large engine loads.
        starting = asyncio.create_task(manager.start())
        starting.add_done_callback(_log_failure)
        stack.push_async_callback(_end, starting)
        yield manager


def _http_server(settings: HttpSettings, manager: EngineManager, sampler: Sampler) -> HttpServer:
    # An agent without it shall not pay for its libraries.
    from edgellm_agent.http.app import Api  # noqa: PLC0415
    from edgellm_agent.http.server import HttpServer  # noqa: PLC0415

    return HttpServer(Api(manager, sampler, settings).app(), settings.listen, settings.max_connections)


def _metrics_server(settings: MetricsSettings, manager: EngineManager, sampler: Sampler) -> HttpServer:
    from edgellm_agent.http.metrics import Metrics  # noqa: PLC0415
    from edgellm_agent.http.server import HttpServer  # noqa: PLC0415

    return HttpServer(Metrics(manager, sampler).app(), settings.listen, settings.max_connections)


async def _stop(servers: list[Server | HttpServer], grace_s: float) -> None:
    """All at once: they share the time that running requests get."""
    await asyncio.gather(*(server.stop(grace_s) for server in servers))


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the active engine does not start", exc_info=task.exception())


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _manager(settings: AgentSettings) -> EngineManager:
    profile = load_profile(settings.profile)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    memory = MemoryPolicy(
        profile=profile,
        simulated=settings.simulate,
        headroom_bytes=profile.headroom_bytes if settings.headroom_bytes is None else settings.headroom_bytes,
        context_tokens=settings.context_tokens,
        max_sequences=settings.max_sequences,
        prefill_tokens=settings.prefill_tokens,
        root=settings.root,
    )
    policy = Policy(
        memory=memory,
        runtimes=_runtimes(),
        architecture=_ARCHITECTURES.get(platform.machine(), platform.machine()),
        serving=Serving(
            threads=settings.threads,
            prefill_tokens=settings.prefill_tokens,
            prefill_budget_s=settings.prefill_budget_s,
            max_waiting=settings.max_waiting,
            speculate=settings.speculate,
            load_timeout_s=settings.load_timeout_s,
            poll_s=settings.telemetry_interval_s,
        ),
        drain_s=settings.drain_s,
    )
    return EngineManager(
        store=Store(settings.state_dir), registry=Registry(settings.state_dir / "registry.db"), policy=policy
    )


def _publisher(settings: AgentSettings, identity: Identity, sampler: Sampler) -> MqttPublisher | None:
    if settings.mqtt is None:
        return None
    return MqttPublisher(
        settings.mqtt,
        sampler,
        device=identity.device,
        state_dir=settings.state_dir,
        agent_version=identity.agent_version,
        profile=settings.profile,
    )


def _runtimes() -> dict[str, str]:
    """Runtimes that are installed, by their metadata: importing one would cost this process its memory."""
    for name in _ONNXRUNTIME:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return {"onnxruntime": metadata.version(name)}
    return {}
