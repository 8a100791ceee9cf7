"""How the agent reaches its MQTT broker."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from edgellm.fleet.topics import NAME_PATTERN, Encoding

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class MqttTlsSettings(BaseModel):
    """TLS to the broker; without a CA file the system's authorities are trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_file: Path | None = None
    # The client's own certificate; brokers are best told to demand that its common name is the device's.
    cert_file: Path | None = None
    key_file: Path | None = None


class MqttSettings(BaseModel):
    """Where, as whom and how often to publish."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(min_length=1, max_length=253)
    port: int = Field(default=1883, ge=1, le=65535)
    username: str | None = None
    # Holds the password alone; a trailing line feed does not count.
    password_file: Path | None = None
    tls: MqttTlsSettings | None = None
    tenant: Name = "default"
    group: Name = "default"
    protocol: Literal["5", "3.1.1"] = "5"
    encoding: Encoding = "json"
    # Of telemetry; the state always travels with 1.
    qos: Literal[0, 1] = 0
    interval_s: float = Field(default=1.0, ge=0.1, le=86_400)
    # How long a broker keeps telemetry for a reader that is away (MQTT 5 only).
    message_expiry_s: int = Field(default=60, ge=1, le=2**32 - 1)
    # A broker publishes the will 1.5 times this after the device has gone silent.
    keepalive_s: int = Field(default=30, ge=5, le=65535)

    @field_validator("host")
    @classmethod
    def _resolvable(cls, host: str) -> str:
        # What the resolver would refuse on every attempt is refused once, here.
        host.encode("idna")
        return host
