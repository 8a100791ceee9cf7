"""What a device says about itself, its engines and their activation, translated from protobuf."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from edgellm.errors import RemoteError
from edgellm.memory import MemoryPlan
from edgellm.v1 import device_pb2, engines_pb2, inference_pb2


@dataclass(frozen=True)
class RuntimeInfo:
    """A runtime that a device has, for example onnxruntime 1.32.0."""

    name: str
    version: str


@dataclass(frozen=True)
class DeviceInfo:
    """What a device says about itself; memory_available_bytes is what a new engine could have now."""

    device: str
    agent_version: str
    profile: str
    simulated: bool
    runtimes: tuple[RuntimeInfo, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    active_engine: str

    @classmethod
    def from_proto(cls, message: device_pb2.GetInfoResponse) -> DeviceInfo:
        """The same facts from a protobuf message."""
        return cls(
            device=message.device,
            agent_version=message.agent_version,
            profile=message.profile,
            simulated=message.simulated,
            runtimes=tuple(RuntimeInfo(item.name, item.version) for item in message.runtimes),
            memory_total_bytes=message.memory_total_bytes,
            memory_available_bytes=message.memory_available_bytes,
            disk_free_bytes=message.disk_free_bytes,
            active_engine=message.active_engine,
        )


@dataclass(frozen=True)
class ModelInfo:
    """A model that a device can answer with; context_tokens is prompt plus answer."""

    name: str
    digest: str
    context_tokens: int
    precision: str
    runtime: str
    active: bool

    @classmethod
    def from_proto(cls, message: inference_pb2.Model) -> ModelInfo:
        """The same facts from a protobuf message."""
        return cls(
            name=message.name,
            digest=message.digest,
            context_tokens=message.context_tokens,
            precision=message.precision,
            runtime=message.runtime,
            active=message.active,
        )


@dataclass(frozen=True)
class EngineInfo:
    """An engine in a device's store."""

    digest: str
    name: str
    runtime: str
    precision: str
    size_bytes: int
    added_at: datetime
    active: bool

    @classmethod
    def from_proto(cls, message: engines_pb2.Engine) -> EngineInfo:
        """The same facts from a protobuf message."""
        return cls(
            digest=message.digest,
            name=message.name,
            runtime=message.runtime,
            precision=message.precision,
            size_bytes=message.size_bytes,
            added_at=message.added_at.ToDatetime(tzinfo=timezone.utc),
            active=message.active,
        )


@dataclass(frozen=True)
class LogLine:
    """A line of a device's log; `logger` is the part of the agent that wrote it."""

    time: datetime
    level: str
    logger: str
    text: str

    @classmethod
    def from_proto(cls, message: device_pb2.LogLine) -> LogLine:
        """The same facts from a protobuf message."""
        return cls(
            time=message.time.ToDatetime(tzinfo=timezone.utc),
            level=message.level,
            logger=message.logger,
            text=message.text,
        )


@dataclass(frozen=True)
class PushProgress:
    """How far a push is: bytes that the device has, of all bytes of the engine."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class PushResult:
    """A finished push; `skipped_bytes` were on the device already."""

    digest: str
    sent_bytes: int
    skipped_bytes: int
    elapsed_s: float
    plan: MemoryPlan


@dataclass(frozen=True)
class ActivationStep:
    """A phase that an activation entered: "verifying", "loading", "canary" or "committed"."""

    phase: str
    elapsed_s: float
    plan: MemoryPlan | None

    @classmethod
    def from_proto(cls, message: engines_pb2.ActivateResponse) -> ActivationStep:
        """The same facts from a protobuf message."""
        return cls(
            phase=word(engines_pb2.ActivationPhase.Name, message.phase, "ACTIVATION_PHASE_"),
            elapsed_s=message.elapsed_s,
            plan=MemoryPlan.from_proto(message.plan) if message.HasField("plan") else None,
        )


def granted(step: ActivationStep | None) -> MemoryPlan:
    """What the device granted, by the last step of an activation; raises RemoteError if not committed."""
    if step is None or step.plan is None or step.phase != "committed":
        raise RemoteError(
            "the activation ended without being committed",
            code="INTERNAL",
            hint="see the agent's log on the device",
        )
    return step.plan


def word(name_of: Callable[[Any], str], value: int, prefix: str) -> str:
    """An enum's value as a plain word; a number that this version does not know stays a number."""
    try:
        return name_of(value).removeprefix(prefix).lower()
    except ValueError:
        return str(value)
