"""Talks to a device: `Client` and its twin `AsyncClient` have the same methods over the same values.

with Client("unix:///run/edgellm/agent.sock") as client:
    for chunk in client.generate("Once upon a time"):
        print(chunk.text, end="", flush=True)
"""

from edgellm.client._async import AsyncClient, AsyncGeneration
from edgellm.client._generation import (
    Chunk,
    Completion,
    Constraint,
    Message,
    Sampling,
    TokenChance,
    TokenLogprob,
)
from edgellm.client._model import (
    ActivationStep,
    AuditRecord,
    CallerInfo,
    DeviceInfo,
    EngineInfo,
    HistoryEntry,
    LogLine,
    ModelInfo,
    PushProgress,
    PushResult,
    RuntimeInfo,
)
from edgellm.client._rate import RateLimit
from edgellm.client._sync import Client, Generation

__all__ = [
    "ActivationStep",
    "AsyncClient",
    "AsyncGeneration",
    "AuditRecord",
    "CallerInfo",
    "Chunk",
    "Client",
    "Completion",
    "Constraint",
    "DeviceInfo",
    "EngineInfo",
    "Generation",
    "HistoryEntry",
    "LogLine",
    "Message",
    "ModelInfo",
    "PushProgress",
    "PushResult",
    "RateLimit",
    "RuntimeInfo",
    "Sampling",
    "TokenChance",
    "TokenLogprob",
]
