"""The rule of each method: the least role that may call it, and what of it is written down.

The one table, whoever calls and however: gRPC by socket or TLS, HTTP, and the fleet over MQTT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.errors import DeniedError

Subject: TypeAlias = Callable[[Any], str]

_OURS = "/edgellm.v1."


class RoleError(DeniedError):
    """The caller's role is too low."""

    def __init__(self, caller: Caller, method: str, needed: Role | None) -> None:
        if needed is None:
            super().__init__(f"{method} is open to nobody")
        else:
            super().__init__(
                f"{caller.name or 'the agent'} has the role {caller.role}; {method} needs {needed}"
            )
        self.needed = needed

    @property
    def hint(self) -> str:
        """What to do about it."""
        if self.needed is None:
            return "bring agent and client to the same version"
        return (
            f"ask whoever runs the device for the role {self.needed}: [access] in its settings for users of "
            "the machine, `edgellm pki issue` for certificates"
        )


@dataclass(frozen=True)
class Rule:
    """Of one method."""

    role: Role
    audited: bool = False
    endless: bool = False
    """It lasts until the client goes away."""
    subject: Subject = lambda _request: ""
    """What a request is about, for the audit log: no prompt, no secret."""


def _field(name: str) -> Subject:
    return lambda request: str(getattr(request, name))


def _manifest(request: Any) -> str:
    return f"sha256:{hashlib.sha256(request.manifest).hexdigest()}"


def _pinned(request: Any) -> str:
    return "pinned" if request.pinned else "unpinned"


def _look(*, endless: bool = False) -> Rule:
    return Rule(Role.VIEWER, endless=endless)


def _change(role: Role, subject: Subject, *, endless: bool = False) -> Rule:
    return Rule(role, audited=True, endless=endless, subject=subject)


RULES: dict[str, Rule] = {
    "InferenceService/Generate": Rule(Role.APP),
    "InferenceService/ListModels": _look(),
    "EngineService/Prepare": _change(Role.OPERATOR, _manifest),
    # Of no effect without Prepare and Commit, which are written down.
    "EngineService/WriteBlob": Rule(Role.OPERATOR),
    "EngineService/Commit": _change(Role.OPERATOR, _field("digest")),
    "EngineService/Activate": _change(Role.OPERATOR, _field("engine")),
    "EngineService/Deactivate": _change(Role.OPERATOR, _field("engine")),
    "EngineService/Rollback": _change(Role.OPERATOR, lambda _request: ""),
    "EngineService/ListEngines": _look(),
    "EngineService/ListHistory": _look(),
    "EngineService/RemoveEngine": _change(Role.OPERATOR, _field("engine")),
    "EngineService/PinEngine": _change(Role.OPERATOR, _pinned),
    "EngineService/HoldEngines": _change(Role.APP, _field("reason"), endless=True),
    "DeviceService/GetInfo": _look(),
    "DeviceService/GetMemoryPlan": _look(),
    "DeviceService/WatchTelemetry": _look(endless=True),
    "DeviceService/WatchLogs": Rule(Role.OPERATOR, endless=True),
    "DeviceService/WhoAmI": _look(),
    "DeviceService/ReadAudit": Rule(Role.ADMIN, audited=True),
    "TrustService/ListKeys": _look(),
    "TrustService/TrustKey": _change(Role.ADMIN, lambda request: request.key.name),
    "TrustService/RevokeKey": _change(Role.ADMIN, _field("key")),
    "grpc.health.v1.Health/Check": _look(),
    "grpc.health.v1.Health/List": _look(),
    "grpc.health.v1.Health/Watch": _look(endless=True),
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _look(endless=True),
}


def short_name(path: str) -> str:
    """A method's name in the table from its path in gRPC: our own services go without their package."""
    return path.removeprefix(_OURS) if path.startswith(_OURS) else path.removeprefix("/")


def check(caller: Caller, method: str) -> Rule:
    """The method's rule; raises DeniedError if the caller's role is too low, or if there is no rule."""
    rule = RULES.get(method)
    if rule is None or caller.role < rule.role:
        raise RoleError(caller, method, None if rule is None else rule.role)
    return rule
