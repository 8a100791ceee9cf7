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
    """The default engine: it answers requests that name none."""
    state: str = ""
    """"STORED", "PROBATION", "COMMITTED", "UNPROVEN" or "BESIDE"."""
    proven: bool = False
    """It was committed there once."""
    signed_by: tuple[str, ...] = ()
    release: int = 0

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
            state=message.state,
            proven=message.proven,
            signed_by=tuple(message.signed_by),
            release=message.release,
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
class CallerInfo:
    """Who somebody is to a device, for example "uid 1000" or "certificate alice", and what they may there."""

    caller: str
    role: str
    """"viewer", "app", "operator" or "admin"."""

    @classmethod
    def from_proto(cls, message: device_pb2.WhoAmIResponse) -> CallerInfo:
        """The same facts from a protobuf message."""
        return cls(caller=message.caller, role=message.role)


@dataclass(frozen=True)
class AuditRecord:
    """Something that was done on a device, or refused; `time` is the device's clock, which may be wrong."""

    sequence: int
    time: datetime
    caller: str
    role: str
    method: str
    subject: str
    outcome: str
    """"OK", or the gRPC status that the call ended with."""
    previous: str
    """SHA-256 of the record before it, hex."""

    @classmethod
    def from_proto(cls, message: device_pb2.AuditRecord) -> AuditRecord:
        """The same facts from a protobuf message."""
        return cls(
            sequence=message.sequence,
            time=message.time.ToDatetime(tzinfo=timezone.utc),
            caller=message.caller,
            role=message.role,
            method=message.method,
            subject=message.subject,
            outcome=message.outcome,
            previous=message.previous,
        )


@dataclass(frozen=True)
class PushProgress:
    """How far a push is: bytes that the device has, of all bytes of the engine, and the rate of late."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest will take at this rate; None as long as there is none."""
        left_bytes = self.total_bytes - self.done_bytes
        return left_bytes / self.bytes_per_s if self.bytes_per_s > 0 else None


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
    """A phase that an activation entered.

    "verifying", "loading", "draining" (the old engine finishes its requests), "canary", "probation" (it
    answers, and is watched for `probation_s` more seconds), "committed".
    """

    phase: str
    elapsed_s: float
    plan: MemoryPlan | None
    probation_s: float = 0.0

    @property
    def answers(self) -> bool:
        """Whether the engine answers requests from here on."""
        return self.phase in {"probation", "committed"}

    @classmethod
    def from_proto(
        cls, message: engines_pb2.ActivateResponse | engines_pb2.RollbackResponse
    ) -> ActivationStep:
        """The same facts from a protobuf message."""
        if isinstance(message, engines_pb2.RollbackResponse):
            message = message.step
        return cls(
            phase=word(engines_pb2.ActivationPhase.Name, message.phase, "ACTIVATION_PHASE_"),
            elapsed_s=message.elapsed_s,
            plan=MemoryPlan.from_proto(message.plan) if message.HasField("plan") else None,
            probation_s=message.probation_s,
        )


@dataclass(frozen=True)
class HistoryEntry:
    """Something that happened to an engine on a device; `time` is the device's clock, which may be wrong."""

    id: int
    time: datetime
    what: str
    engine: str
    previous: str
    origin: str
    generation: int
    actor: str
    error: str

    @classmethod
    def from_proto(cls, message: engines_pb2.HistoryEntry) -> HistoryEntry:
        """The same facts from a protobuf message."""
        change = message.change
        return cls(
            id=message.id,
            time=message.time.ToDatetime(tzinfo=timezone.utc),
            what=change.what,
            engine=change.engine,
            previous=change.previous,
            origin=change.origin,
            generation=change.generation,
            actor=change.actor,
            error=change.error,
        )


def granted(step: ActivationStep | None) -> MemoryPlan:
    """What the device granted, by the last step of an activation; raises RemoteError without an answer."""
    if step is None or step.plan is None or not step.answers:
        raise RemoteError(
            "the activation ended before the engine answered",
            code="INTERNAL",
            hint="see the agent's log on the device",
        )
    return step.plan


def check_hold(granted: engines_pb2.HoldEnginesResponse | None) -> None:
    """Raises RemoteError if the device ended the hold before it began."""
    if granted is None:
        raise RemoteError("the device is about to stop", code="UNAVAILABLE", hint="try again when it is back")


def word(name_of: Callable[[Any], str], value: int, prefix: str) -> str:
    """An enum's value as a plain word; a number that this version does not know stays a number."""
    try:
        return name_of(value).removeprefix(prefix).lower()
    except ValueError:
        return str(value)
