"""A device's engine manager without the rest of the agent, and a fleet that it can talk to in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.bundle import Bundle, BundleWriter
from edgellm.fleet.topics import DeviceTopics, encode, envelope
from edgellm.profiles import load_profile
from edgellm.v1 import fleet_pb2
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.lifecycle.rack import Policy
from edgellm_agent.lifecycle.settings import LifecycleSettings
from edgellm_agent.memory import MemoryPolicy
from edgellm_agent.mqtt.base import MessageProperties, OnMessage
from edgellm_agent.registry import Registry
from edgellm_agent.store import Store
from tests.support.still_rack import StillRack
from tests.support.tiny_bundle import make_config, make_files

NOW_NS = 1_800_000_000_000_000_000
TOPICS = DeviceTopics("acme", "press", "jetson-01")
DEADLINE_S = 20.0


class StillManager(EngineManager):
    """The real manager over engines that stand still."""

    rack_type = StillRack


def make_manager(
    state_dir: Path, kind: type[EngineManager] = StillManager, *, probation_s: float = 0, **runtimes: str
) -> EngineManager:
    state_dir.mkdir(parents=True, exist_ok=True)
    profile = load_profile("orin-nano-8gb")
    memory = MemoryPolicy(
        profile=profile,
        simulated=True,
        headroom_bytes=profile.headroom_bytes,
        context_tokens=2048,
        max_sequences=4,
        prefill_tokens=64,
    )
    policy = Policy(memory=memory, runtimes=runtimes or {"onnxruntime": "1.30.0"}, architecture="amd64")
    return kind(
        Store(state_dir),
        Registry(state_dir / "registry.db"),
        policy,
        settings=LifecycleSettings(probation_s=probation_s),
    )


def install(manager: EngineManager, bundle: Bundle, digest: str) -> str:
    """What a push over the device's own API does."""
    manifest = bundle.manifest(digest)
    manager.begin_push(manifest, bundle.config(manifest))
    for blob in manifest.blobs():
        if not manager.store.has(blob.digest):
            manager.store.put(bundle.blob_path(blob.digest).read_bytes())
    return manager.commit_push(digest).digest


def make_layout(root: Path, **changes: object) -> tuple[Bundle, str]:
    """A bundle of a few MiB that nobody can run, at `root`; and its engine's digest."""
    files = make_files(root.with_name(root.name + ".files"), **_weights(changes))
    with BundleWriter(root) as writer:
        digest = writer.add(files, make_config(**changes))
    return Bundle.open(root), digest


def _weights(changes: dict[str, object]) -> dict[str, bytes]:
    weights = changes.pop("weights", None)
    return {} if weights is None else {"weights": weights}


@dataclass
class FakeUplink:
    """Keeps what is published, and hands over what a test sends."""

    retained: dict[str, fleet_pb2.Event] = field(default_factory=dict)
    sent: list[tuple[str, fleet_pb2.Event]] = field(default_factory=list)
    history: list[fleet_pb2.Reported] = field(default_factory=list)
    callbacks: dict[str, OnMessage] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    correlated: list[bytes] = field(default_factory=list)
    sequence: int = 0
    topics = TOPICS
    connected = True

    def new_event(self, kind: str) -> fleet_pb2.Event:
        self.sequence += 1
        return envelope(TOPICS, kind, 7, self.sequence, NOW_NS)

    def publish_retained(self, topic: str, event: fleet_pb2.Event) -> None:
        self.retained[topic] = event
        self.history.append(event.reported)
        self.changed.set()

    def publish_event(self, topic: str, event: fleet_pb2.Event, *, correlation_data: bytes = b"") -> None:
        self.sent.append((topic, event))
        self.correlated.append(correlation_data)
        self.changed.set()

    def on_message(self, topic: str, callback: OnMessage) -> None:
        self.callbacks[topic] = callback

    def send(self, topic: str, payload: bytes, correlation_data: bytes | None = None) -> None:
        """Hands a payload to the device as its broker would."""
        self.callbacks[topic](topic, payload, MessageProperties(False, correlation_data=correlation_data))

    @property
    def reported(self) -> fleet_pb2.Reported:
        return self.retained[TOPICS.reported].reported

    @property
    def phases(self) -> list[str]:
        """Each phase once for every time that it was entered."""
        phases = [reported.phase for reported in self.history]
        return [phase for before, phase in zip(["", *phases], phases, strict=False) if phase != before]

    def desire(self, generation: int, engine: str, source: str = "") -> None:
        event = fleet_pb2.Event(id=f"d-{generation}", type="edgellm.desired.v1")
        event.desired.CopyFrom(fleet_pb2.Desired(generation=generation, engine=engine, source=source))
        self.send(TOPICS.desired, encode(event, "json"))

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Returns once what was published makes it true."""

        async def wait() -> None:
            while not wanted():
                self.changed.clear()
                await self.changed.wait()

        try:
            await asyncio.wait_for(wait(), DEADLINE_S)
        except asyncio.TimeoutError:
            raise AssertionError(
                f"did not come; reported: {self.history[-1:]}, sent: {self.sent[-1:]}"
            ) from None

    async def until_phase(self, *phases: str) -> fleet_pb2.Reported:
        await self.until(lambda: self.reported.phase in phases)
        return self.reported
