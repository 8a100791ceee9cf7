"""How each part of the agent is made from its settings."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING

from edgellm.bundle.manifest import EngineManifest
from edgellm.errors import EdgellmError
from edgellm.profiles import load_profile
from edgellm_agent.access.settings import AccessSettings
from edgellm_agent.config import AgentSettings
from edgellm_agent.engine.supervisor import Serving
from edgellm_agent.events import Events
from edgellm_agent.governor.controller import GovernorLoop
from edgellm_agent.governor.power_mode import PowerModes, ask_helper
from edgellm_agent.http.settings import HttpSettings, MetricsSettings
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.lifecycle.rack import Policy
from edgellm_agent.memory import MemoryPolicy
from edgellm_agent.mqtt.credentials import load_tls, read_password
from edgellm_agent.mqtt.publisher import MqttPublisher
from edgellm_agent.registry import Registry
from edgellm_agent.services.device import Identity
from edgellm_agent.services.trust import TrustServicer
from edgellm_agent.store import Store
from edgellm_agent.store.disk import check_writable, writing
from edgellm_agent.store.scrub import Scrubber
from edgellm_agent.telemetry.sampler import Sampler
from edgellm_agent.trust.policy import DeviceTrust, Held

if TYPE_CHECKING:
    from edgellm_agent.access.certificates import Certificates
    from edgellm_agent.http.server import HttpServer

# Distributions that bring the onnxruntime module.
_ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def check_files(settings: AgentSettings) -> None:
    """Looks at the files that settings name, before anything is made; raises EdgellmError."""
    try:
        certificates(settings)
        if settings.http is not None:
            # As above: only who uses it loads it.
            from edgellm_agent.http.guard import open_key  # noqa: PLC0415

            open_key(settings.http)
        if settings.mqtt is not None:
            read_password(settings.mqtt.password_file)
            if settings.mqtt.tls is not None:
                load_tls(settings.mqtt.tls)
    except ValueError as error:
        raise EdgellmError(
            str(error), "correct the path in the settings, or the file's permissions"
        ) from None
    ca_file = settings.desired.ca_file
    if ca_file is not None and not os.access(ca_file, os.R_OK):
        raise EdgellmError(f"desired ca_file {ca_file} cannot be read", "correct the path in the settings")


def certificates(settings: AgentSettings) -> Certificates | None:
    if settings.tls is None:
        return None
    # An agent without a port shall not pay for its libraries.
    from edgellm_agent.access.certificates import Certificates  # noqa: PLC0415

    return Certificates(settings.tls)


def http_server(
    settings: HttpSettings, manager: EngineManager, sampler: Sampler, access: AccessSettings
) -> HttpServer:
    # An agent without it shall not pay for its libraries.
    from edgellm_agent.http.app import Api  # noqa: PLC0415
    from edgellm_agent.http.server import HttpServer  # noqa: PLC0415

    api = Api(manager, sampler, settings, access)
    return HttpServer(api.app(), settings.listen, settings.max_connections)


def metrics_server(settings: MetricsSettings, manager: EngineManager, sampler: Sampler) -> HttpServer:
    from edgellm_agent.http.metrics import Metrics  # noqa: PLC0415
    from edgellm_agent.http.server import HttpServer  # noqa: PLC0415

    return HttpServer(Metrics(manager, sampler).app(), settings.listen, settings.max_connections)


def trust(settings: AgentSettings) -> DeviceTrust:
    with writing(settings.state_dir):
        settings.state_dir.mkdir(parents=True, exist_ok=True)
    check_writable(settings.state_dir)
    return DeviceTrust(settings.trust, settings.state_dir, settings.profile)


def trust_servicer(trust: DeviceTrust, manager: EngineManager) -> TrustServicer:
    def held() -> list[Held]:
        return [Held(e.digest, manager.registry.attestations(e.digest)) for e in manager.engines()]

    return TrustServicer(trust, held)


def manager(settings: AgentSettings, events: Events, trust: DeviceTrust) -> EngineManager:
    profile = load_profile(settings.profile)
    memory = MemoryPolicy(
        profile=profile,
        simulated=settings.simulate,
        headroom_bytes=_headroom_bytes(settings),
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
            hang_s=settings.lifecycle.hang_s,
            loop_deaths=settings.lifecycle.loop_deaths,
            loop_window_s=settings.lifecycle.loop_window_s,
        ),
        drain_s=settings.drain_s,
    )
    return EngineManager(
        store=Store(settings.state_dir, settings.store),
        registry=Registry(settings.state_dir / "registry.db"),
        policy=policy,
        settings=settings.lifecycle,
        trust=trust,
        events=events,
    )


def scrubber(settings: AgentSettings, manager: EngineManager) -> Scrubber:
    def manifests() -> list[EngineManifest]:
        # As often as it reads: a push that was given up keeps its place on the disk no longer.
        manager.library.forget_old_pushes()
        return [engine.manifest for engine in manager.engines()]

    return Scrubber(manager.store, settings.store, manifests, manager.library.damaged)


def _headroom_bytes(settings: AgentSettings) -> int:
    if settings.headroom_bytes is not None:
        return settings.headroom_bytes
    return load_profile(settings.profile).headroom_bytes


def governor(
    settings: AgentSettings, manager: EngineManager, sampler: Sampler, events: Events
) -> GovernorLoop | None:
    governor = settings.governor
    if not governor.enabled:
        return None
    modes = None
    if governor.power_modes:
        by_state = {str(state): mode for state, mode in governor.power_modes.items()}
        modes = PowerModes(by_state, functools.partial(ask_helper, governor.power_mode_socket))
    return GovernorLoop(
        governor,
        sampler,
        lambda: manager.rack,
        events,
        max_sequences=settings.max_sequences,
        headroom_bytes=_headroom_bytes(settings),
        power_modes=modes,
        silence_s=max(5.0, 5 * settings.telemetry_interval_s),
    )


def uplink(settings: AgentSettings, identity: Identity, sampler: Sampler) -> MqttPublisher | None:
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
