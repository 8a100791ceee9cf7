"""How the agent reaches its MQTT broker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edgellm.fleet.topics import NAME_PATTERN, Encoding
from edgellm_agent.access.settings import RoleName
from edgellm_agent.mqtt.deadband import DEFAULTS

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class MqttTlsSettings(BaseModel):
    """TLS to the broker; without a CA file the system's authorities are trusted.

    The files are read again at each connection, so that a renewed certificate needs no restart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_file: Path | None = None
    # The client's own certificate; brokers are best told to demand that its common name is the device's.
    cert_file: Path | None = None
    key_file: Path | None = None

    @model_validator(mode="after")
    def _a_key_has_a_certificate(self) -> MqttTlsSettings:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file is of no use without cert_file")
        return self


class MqttSettings(BaseModel):
    """Where, as whom and how often to publish."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(min_length=1, max_length=253)
    port: int = Field(default=1883, ge=1, le=65535)
    username: str | None = None
    # Holds the password alone; a trailing line feed does not count.
    password_file: Path | None = None
    tls: MqttTlsSettings | None = None
    # What the fleet may do here: the role that each of its wishes and commands is measured by.
    role: RoleName = "operator"
    tenant: Name = "default"
    group: Name = "default"
    protocol: Literal["5", "3.1.1"] = "5"
    encoding: Encoding = "json"
    # Of live telemetry; all else always travels with 1.
    qos: Literal[0, 1] = 1
    interval_s: float = Field(default=1.0, ge=0.1, le=86_400)
    # A telemetry topic goes out when a metric moved by more than its deadband, and at the latest after this.
    max_silence_s: float = Field(default=60.0, ge=0, le=86_400)
    # Metric, for example "thermal.max_celsius", to what it may move unsaid; `deadband.DEFAULTS` has the rest.
    deadband: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    # How long a broker keeps live telemetry for a reader that is away (MQTT 5 only).
    message_expiry_s: int = Field(default=60, ge=1, le=2**32 - 1)
    # A broker publishes the will 1.5 times this after the device has gone silent.
    keepalive_s: int = Field(default=30, ge=5, le=65535)
    # How long the broker keeps commands for the device while it is away (MQTT 5 only).
    session_expiry_s: int = Field(default=3600, ge=0, le=2**32 - 1)
    # What may wait on disk for the broker.
    outbox_bytes: int = Field(default=64 << 20, ge=1 << 20, le=1 << 40)
    # Without a broker, records are kept this far apart.
    offline_interval_s: float = Field(default=10.0, ge=0.1, le=86_400)
    # How fast kept telemetry goes out once the broker is back.
    catch_up_messages_per_s: float = Field(default=20.0, ge=0.1, le=10_000)

    @field_validator("host")
    @classmethod
    def _resolvable(cls, host: str) -> str:
        # What the resolver would refuse on every attempt is refused once, here.
        host.encode("idna")
        return host

    @field_validator("deadband", mode="before")
    @classmethod
    def _flat(cls, value: object) -> object:
        """In TOML, `thermal.max_celsius = 1` is a table in a table."""
        return _flatten(value) if isinstance(value, Mapping) else value

    @field_validator("deadband")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in DEFAULTS:
                raise ValueError(f"no metric {name!r}; there are {', '.join(sorted(DEFAULTS))}")
        return value


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{rest}": leaf for rest, leaf in _flatten(value).items()}
        else:
            flat[name] = value
    return flat
