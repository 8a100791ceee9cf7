"""What an operator may set of the listeners."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


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
