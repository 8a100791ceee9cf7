"""The values that both clients take and return, and their translation from and to protobuf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
            phase=_word(engines_pb2.ActivationPhase.Name, message.phase, "ACTIVATION_PHASE_"),
            elapsed_s=message.elapsed_s,
            plan=MemoryPlan.from_proto(message.plan) if message.HasField("plan") else None,
        )


@dataclass(frozen=True)
class Message:
    """A turn of a chat; the role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, a seed of None a random one."""

    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """A finished answer and what it cost; the finish reason is "stop" or "length"."""

    request_id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    kv_bytes: int
    queue_s: float
    ttft_s: float
    decode_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed after the first token; 0 if there was no second one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class GenerationState:
    """What a stream of answers has brought so far."""

    texts: list[str] = field(default_factory=list)
    completion: Completion | None = None

    def take(self, message: inference_pb2.GenerateResponse) -> Chunk | None:
        """The piece that a message brings; None if it only says how the answer ended."""
        self.texts.append(message.text)
        if message.finish_reason:
            self.completion = Completion(
                request_id=message.request_id,
                text="".join(self.texts),
                finish_reason=_word(inference_pb2.FinishReason.Name, message.finish_reason, "FINISH_REASON_"),
                prompt_tokens=message.usage.prompt_tokens,
                completion_tokens=message.usage.completion_tokens,
                kv_bytes=message.usage.kv_bytes,
                queue_s=message.timings.queue_s,
                ttft_s=message.timings.ttft_s,
                decode_s=message.timings.decode_s,
            )
        return Chunk(message.text, tuple(message.token_ids)) if message.text or message.token_ids else None

    def finished(self) -> Completion:
        """The summary; raises RemoteError if the stream ended without one."""
        if self.completion is None:
            raise RemoteError(
                "the answer ended early", code="INTERNAL", hint="see the agent's log on the device"
            )
        return self.completion


def generate_request(
    prompt: str | Sequence[Message],
    *,
    model: str,
    sampling: Sampling | None,
    max_tokens: int,
    stop: Iterable[str],
    ignore_eos: bool,
) -> inference_pb2.GenerateRequest:
    """Text that is tokenized as it is, or messages that go through the model's chat template."""
    request = inference_pb2.GenerateRequest(
        model=model, max_tokens=max_tokens, stop=list(stop), ignore_eos=ignore_eos
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    else:
        request.chat.SetInParent()
        for message in prompt:
            request.chat.messages.add(role=message.role, content=message.content)
    chosen = sampling or Sampling()
    request.sampling.temperature = chosen.temperature
    if chosen.top_p is not None:
        request.sampling.top_p = chosen.top_p
    if chosen.seed is not None:
        request.sampling.seed = chosen.seed
    return request


def granted(step: ActivationStep | None) -> MemoryPlan:
    """What the device granted, by the last step of an activation; raises RemoteError if not committed."""
    if step is None or step.plan is None or step.phase != "committed":
        raise RemoteError(
            "the activation ended without being committed",
            code="INTERNAL",
            hint="see the agent's log on the device",
        )
    return step.plan


def _word(name_of: Callable[[Any], str], value: int, prefix: str) -> str:
    """An enum's value as a plain word; a number that this version does not know stays a number."""
    try:
        return name_of(value).removeprefix(prefix).lower()
    except ValueError:
        return str(value)
