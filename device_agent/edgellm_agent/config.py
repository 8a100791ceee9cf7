"""The agent's settings: a TOML file, and environment variables that override it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from edgellm.errors import EdgellmError
from edgellm.memory import PREFILL_TOKENS
from edgellm_agent.access.settings import AccessSettings, TlsSettings, check_listen
from edgellm_agent.desired.settings import CommandSettings, DesiredSettings
from edgellm_agent.governor.settings import GovernorSettings
from edgellm_agent.http.settings import Address, HttpSettings, MetricsSettings
from edgellm_agent.lifecycle.settings import LifecycleSettings
from edgellm_agent.mqtt.settings import MqttSettings
from edgellm_agent.store.settings import StoreSettings
from edgellm_agent.telemetry.detect import source_setting
from edgellm_agent.trust.settings import TrustSettings

DeviceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class AgentSettings(BaseSettings):
    """Everything that an operator may set.

    `EDGELLM_AGENT_DEVICE` overrides `device`, `EDGELLM_AGENT_MQTT__HOST` `mqtt.host`.
    """

    model_config = SettingsConfigDict(
        env_prefix="EDGELLM_AGENT_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    device: DeviceName = Field(default_factory=socket.gethostname, description="name in the fleet")
    profile: str = Field(default="host", description="device profile; `edgellm device profiles` lists them")
    simulate: bool = Field(
        default=False, description="enforce the profile's memory limit on a machine of another kind"
    )
    state_dir: Path = Field(default=Path("/var/lib/edgellm"), description="engines, registry, counters")
    socket: Path = Field(default=Path("/run/edgellm/agent.sock"), description="Unix socket of the gRPC API")
    listen: Address | None = Field(
        default=None, description="address for the API too, with [tls], for example 0.0.0.0:7077"
    )
    tls: TlsSettings | None = None
    access: AccessSettings = AccessSettings()
    headroom_bytes: int | None = Field(
        default=None, ge=0, description="memory left to others; default: the profile's"
    )
    context_tokens: int = Field(default=4096, ge=16, description="longest prompt plus answer")
    max_sequences: int = Field(default=8, ge=1, le=64, description="requests that run at once")
    max_waiting: int = Field(default=64, ge=0, le=4096, description="requests that may wait for memory")
    prefill_tokens: int = Field(
        default=PREFILL_TOKENS, ge=1, le=4096, description="longest chunk of a prompt"
    )
    prefill_budget_s: float = Field(
        default=0.1, gt=0, le=10, description="longest that a chunk of a prompt may hold up running streams"
    )
    speculate: bool = Field(
        default=True, description="guess tokens from the text so far and verify several at once, if it pays"
    )
    threads: int = Field(default=0, ge=0, le=256, description="CPU threads of the runtime; 0: one per core")
    load_timeout_s: float = Field(default=300, gt=0)
    drain_s: float = Field(default=30, ge=0, description="what running requests get when the agent stops")
    root: Path = Field(
        default=Path("/"),
        description="where /proc/meminfo and its like are read; another one is for tests",
    )
    telemetry_source: Annotated[str, AfterValidator(source_setting)] = Field(
        default="auto", description="auto, sysfs, host, jtop, or replay:FILE[?speed=N]"
    )
    telemetry_interval_s: float = Field(default=1.0, ge=0.1, le=3600)
    store: StoreSettings = StoreSettings()
    lifecycle: LifecycleSettings = LifecycleSettings()
    trust: TrustSettings = TrustSettings()
    governor: GovernorSettings = GovernorSettings()
    mqtt: MqttSettings | None = None
    desired: DesiredSettings = DesiredSettings()
    commands: CommandSettings = CommandSettings()
    http: HttpSettings | None = None
    metrics: MetricsSettings | None = None

    @model_validator(mode="after")
    def _fleet_needs_a_broker(self) -> AgentSettings:
        if self.mqtt is None and (self.desired.sources or self.commands.allow):
            raise ValueError("desired and commands come over MQTT: set mqtt.host too")
        return self

    @model_validator(mode="after")
    def _a_port_needs_tls(self) -> AgentSettings:
        check_listen(self.listen, self.tls)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What the command line says before the environment, and that before the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(path: Path | None, overrides: Mapping[str, Any] | None = None) -> AgentSettings:
    """Reads file and environment; `overrides` go before both. Raises EdgellmError that names the field."""

    class FromFile(AgentSettings):
        model_config = SettingsConfigDict(toml_file=path)

    if path is not None and not path.is_file():
        raise EdgellmError(f"no settings file {path}", "give an existing one with --config")
    try:
        return FromFile(**(overrides or {}))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        where = "on the command line" if field in (overrides or {}) else f"in {path or 'the environment'}"
        what = first["msg"].removeprefix("Value error, ")
        raise EdgellmError(f"setting {field}: {what}" if field else what, f"correct it {where}") from None
    except SettingsError as error:
        hint = 'in the environment a list is written as JSON: \'["a", "b"]\''
        raise EdgellmError(str(error), hint) from None
    except ValueError as error:
        raise EdgellmError(f"{path} is not TOML: {error}", "correct the file") from None
