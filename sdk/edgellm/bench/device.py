"""A device under load: its answers over gRPC, what it is, and what it draws meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgellm.bench.metrics import PowerSample
from edgellm.bench.target import Piece, Request, Usage
from edgellm.client import AsyncClient, ModelInfo
from edgellm.errors import EdgellmError
from edgellm.v1.telemetry_pb2 import Telemetry

if TYPE_CHECKING:
    from typing_extensions import Self

# A day of readings at one a second.
_MOST_SAMPLES = 86_400
_FIRST_RECORD_S = 5.0


@dataclass(frozen=True)
class System:
    """What was measured, on which versions, from where: all that a figure needs beside it."""

    device: str
    profile: str
    simulated: bool
    power_mode: str
    engine: str
    digest: str
    precision: str
    context_tokens: int
    runtime: str
    runtime_version: str
    max_sequences: int
    kv_bytes: int
    agent_version: str
    client_version: str
    client_machine: str
    measured_at: datetime


class DeviceTarget:
    """A device as the target of a load; the client stays the caller's.

    Args:
        client: Where the device is.
        model: Name or digest of the engine; empty for the active one.
        timeout_s: Deadline of each request.
    """

    def __init__(self, client: AsyncClient, *, model: str = "", timeout_s: float = 600.0) -> None:
        self._client = client
        self._model = model
        self._timeout_s = timeout_s

    async def generate(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer, to its full length: end-of-sequence tokens do not end it."""
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        answer = self._client.generate(
            prompt,
            model=self._model,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            timeout_s=self._timeout_s,
        )
        async with answer:
            async for chunk in answer:
                yield Piece(len(chunk.token_ids), chunk.text)
            done = answer.completion
            yield Piece(0, usage=Usage(done.prompt_tokens, done.completion_tokens, done.queue_s, done.ttft_s))


class PowerMeter:
    """Reads what the device's module draws, for as long as the context lasts.

    A device without a sensor, or one that goes away, leaves the readings empty or short.
    """

    def __init__(self, client: AsyncClient, *, interval_s: float = 1.0) -> None:
        self._client = client
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self.samples: deque[PowerSample] = deque(maxlen=_MOST_SAMPLES)

    async def __aenter__(self) -> Self:
        """Begins to read."""
        self._task = asyncio.create_task(self._read(), name="bench-power")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the stream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(EdgellmError):
            async for record in self._client.watch_telemetry(self._interval_s):
                if record.power.HasField("total_mw"):
                    self.samples.append(PowerSample(clock(), record.power.total_mw))


async def describe(client: AsyncClient, model: str = "") -> System:
    """The device and the engine that would answer; raises EdgellmError if there is none."""
    info, models = await client.info(), await client.models()
    engine = _chosen(models, model)
    plan = await client.memory_plan()
    versions = {runtime.name: runtime.version for runtime in info.runtimes}
    return System(
        device=info.device,
        profile=info.profile,
        simulated=info.simulated,
        power_mode=await _power_mode(client),
        engine=engine.name,
        digest=engine.digest,
        precision=engine.precision,
        context_tokens=min(engine.context_tokens, plan.context_tokens),
        runtime=engine.runtime,
        runtime_version=versions.get(engine.runtime, ""),
        max_sequences=plan.max_sequences,
        kv_bytes=plan.kv_bytes,
        agent_version=info.agent_version,
        client_version=metadata.version("edgellm"),
        client_machine=client_machine(),
        measured_at=datetime.now(timezone.utc),
    )


def client_machine() -> str:
    """The machine that sends the load, on one line."""
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def _chosen(models: list[ModelInfo], model: str) -> ModelInfo:
    for item in models:
        if model in {item.name, item.digest} or (not model and item.active):
            return item
    if model:
        known = ", ".join(item.name for item in models) or "none"
        raise EdgellmError(f"the device has no engine {model!r:.80}; it has: {known}", "correct --model")
    raise EdgellmError("no engine is active on the device", "bring one there with `edgellm push`")


async def _power_mode(client: AsyncClient) -> str:
    """By name, for example "15W"; empty where the device does not say."""
    with contextlib.suppress(EdgellmError):
        # Written as a generator, typed as an iterator.
        watching = cast("AsyncGenerator[Telemetry, None]", client.watch_telemetry(timeout_s=_FIRST_RECORD_S))
        async with contextlib.aclosing(watching) as records:
            async for record in records:
                return record.power.mode
    return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
