"""What an operator may set of the listeners."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr


def is_loopback(host: str) -> bool:
    """Whether a host, written without a port, is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _loopback_only(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not is_loopback(host.strip("[]")) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("must be a loopback address and a port, for example 127.0.0.1:7077")
    return value


LoopbackAddress = Annotated[str, AfterValidator(_loopback_only)]


class HttpSettings(BaseModel):
    """The OpenAI-compatible API."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: LoopbackAddress = Field(description="loopback address, for example 127.0.0.1:8080")
    api_key: SecretStr | None = Field(
        default=None, min_length=1, description="what requests below /v1 must carry as a bearer token"
    )
    max_connections: int = Field(default=64, ge=1, le=1024)
    timeout_s: float = Field(default=600, gt=0, le=86_400, description="longest that one answer may take")


def _any_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host.strip("[]") or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("must be an address and a port, for example 127.0.0.1:9464 or 0.0.0.0:9464")
    return value


class MetricsSettings(BaseModel):
    """A listener for Prometheus and for probes of health: /metrics and /healthz, read only, without a key.

    Unlike the API's, its address may be any: whoever writes another than the default's loopback wants the
    figures, which name no prompt, read from there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: Annotated[str, AfterValidator(_any_address)] = Field(
        default="127.0.0.1:9464", description="address, for example 127.0.0.1:9464 or 0.0.0.0:9464"
    )
    max_connections: int = Field(default=16, ge=1, le=1024)
