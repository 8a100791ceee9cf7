"""What an operator may set of the listeners."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator


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


def _any_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host.strip("[]") or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("must be an address and a port, for example 127.0.0.1:9464 or 0.0.0.0:9464")
    return value


Address = Annotated[str, AfterValidator(_any_address)]


class HttpSettings(BaseModel):
    """The OpenAI-compatible API.

    Its clients know no client certificates, so it stays on loopback, and a key stands for the file permission
    that the Unix socket has: without one every local user and program could ask.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: LoopbackAddress = Field(description="loopback address, for example 127.0.0.1:8080")
    api_key: SecretStr | None = Field(
        default=None, min_length=1, description="what requests below /v1 must carry as a bearer token"
    )
    api_key_file: Path | None = Field(
        default=None, description="holds the key alone; read again if it changes"
    )
    open: bool = Field(default=False, description="no key: all users and programs of this machine may ask")
    max_connections: int = Field(default=64, ge=1, le=1024)
    timeout_s: float = Field(default=600, gt=0, le=86_400, description="longest that one answer may take")

    @model_validator(mode="after")
    def _keyed_or_open(self) -> HttpSettings:
        given = [self.api_key is not None, self.api_key_file is not None, self.open]
        if sum(given) != 1:
            raise ValueError(
                "give one of api_key_file (a file with a long random key), api_key, and open = true, which "
                "lets all users and programs of this machine ask"
            )
        return self


class MetricsSettings(BaseModel):
    """A listener for Prometheus and for probes of health: /metrics and /healthz, read only, without a key.

    Unlike the API's, its address may be any: whoever writes another than the default's loopback wants the
    figures, which name no prompt, read from there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: Address = Field(
        default="127.0.0.1:9464", description="address, for example 127.0.0.1:9464 or 0.0.0.0:9464"
    )
    max_connections: int = Field(default=16, ge=1, le=1024)
