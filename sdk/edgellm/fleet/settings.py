"""How this machine reaches the fleet's MQTT broker: options of a command over `fleet.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edgellm import paths, toml
from edgellm.errors import EdgellmError
from edgellm.fleet.topics import NAME_PATTERN

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_HOW = "write mqtt://HOST[:1883] or mqtts://HOST[:8883]"


class BrokerSettings(BaseModel):
    """Where the broker is, and as whom to speak to it; MQTT 5."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # "mqtt://host:1883" or, with TLS, "mqtts://host:8883".
    broker: str = Field(max_length=300)
    tenant: Annotated[str, Field(pattern=NAME_PATTERN)] = "default"
    # Without one, the system's authorities are trusted.
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    username: str | None = None
    # Holds the password alone; a trailing line feed does not count.
    password_file: Path | None = None

    @field_validator("broker")
    @classmethod
    def _an_address(cls, broker: str) -> str:
        url = urlsplit(broker)
        if url.scheme not in _PORTS or not url.hostname or url.path.strip("/") or url.query:
            raise ValueError(_HOW)
        if url.username is not None:
            raise ValueError(f"{_HOW}, and the name as --username: an address is seen by all users")
        if not 0 < _port(url) < 65536:
            raise ValueError(_HOW)
        url.hostname.encode("idna")
        return broker

    @model_validator(mode="after")
    def _whole(self) -> BrokerSettings:
        if not self.tls and any((self.ca, self.cert, self.key)):
            raise ValueError("ca, cert and key are for TLS: write mqtts://")
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs both cert and key")
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs a username")
        return self

    @property
    def tls(self) -> bool:
        """Whether the way is encrypted."""
        return urlsplit(self.broker).scheme == "mqtts"

    @property
    def host(self) -> str:
        """Name or address of the broker's machine."""
        return urlsplit(self.broker).hostname or ""

    @property
    def port(self) -> int:
        """The broker's port; what the scheme usually has if none is named."""
        return _port(urlsplit(self.broker))


def settings_path() -> Path:
    """Where `edgellm fleet connect` keeps the settings."""
    return paths.config_dir() / "fleet.toml"


def load(options: dict[str, Any], path: Path | None = None) -> BrokerSettings:
    """The kept settings, with each option that is not None in place of what was kept.

    Another broker in `options` starts afresh: a name and a certificate are for the broker that they were
    kept with. Raises EdgellmError, which names the field.
    """
    path = path or settings_path()
    given = {name: value for name, value in options.items() if value is not None}
    kept = {} if "broker" in given else _kept(path)
    merged = kept | given
    if "broker" not in merged:
        raise EdgellmError(
            "no broker is known here", "name it with --broker, or once with `edgellm fleet connect`"
        )
    try:
        return BrokerSettings.model_validate(merged)
    except (ValidationError, ValueError) as error:
        raise EdgellmError(
            f"broker settings: {_in_words(error)}", f"correct the option or {path}" if kept else _HOW
        ) from None


def keep(settings: BrokerSettings, path: Path | None = None) -> Path:
    """Keeps the settings for the commands to come; raises OSError."""
    path = path or settings_path()
    fields = settings.model_dump(mode="json", exclude_none=True)
    for name in ("ca", "cert", "key", "password_file"):
        if name in fields:
            fields[name] = str(Path(fields[name]).absolute())
    paths.write_atomically(path, tomli_w.dumps(fields).encode())
    return path


def password(settings: BrokerSettings) -> str | None:
    """What the password file holds; raises EdgellmError."""
    path = settings.password_file
    if path is None:
        return None
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgellmError(f"password_file {path} cannot be read: {error}", "check --password-file") from None


def _kept(path: Path) -> dict[str, Any]:
    try:
        return dict(toml.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgellmError(
            f"{path} cannot be read: {error}", "correct it, or write it anew with `edgellm fleet connect`"
        ) from None


def _port(url: SplitResult) -> int:
    try:
        return _PORTS[url.scheme] if url.port is None else url.port
    except ValueError:
        raise ValueError(_HOW) from None


def _in_words(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    parts = []
    for item in error.errors():
        where = ".".join(str(word) for word in item["loc"])
        what = item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {what}" if where else what)
    return "; ".join(parts)
