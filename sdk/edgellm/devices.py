"""The devices that this machine knows by name: `devices.toml`, each with the address of its agent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from edgellm import paths, toml
from edgellm.errors import EdgellmError, UnknownDeviceError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TARGET = re.compile(r"unix:///\S+|(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class Device:
    """A device and where its agent listens: `unix:///run/edgellm/agent.sock` or `host:port`."""

    name: str
    target: str


class DeviceBook:
    """The known devices, kept in one TOML file.

    Args:
        path: The file; None means `devices.toml` in the user's configuration directory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or paths.config_dir() / "devices.toml"

    def all(self) -> list[Device]:
        """The known devices by name; raises EdgellmError if the file is damaged."""
        try:
            entries = toml.loads(self.path.read_text(encoding="utf-8")).get("devices", {})
            return [Device(name, _checked_target(entries[name]["target"])) for name in sorted(entries)]
        except FileNotFoundError:
            return []
        except (toml.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, EdgellmError) as error:
            raise EdgellmError(
                f"{self.path} cannot be read: {error}", "correct the file or delete it"
            ) from None

    def find(self, name: str) -> Device:
        """The device of that name; an address in place of a name is taken as it is.

        Raises UnknownDeviceError, which lists the known names.
        """
        if _TARGET.fullmatch(name):
            return Device(name, name)
        devices = self.all()
        for device in devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in devices) or "none"
        raise UnknownDeviceError(
            f"unknown device {name!r:.80}; known: {known}",
            f"add it with `edgellm device add {name if _NAME.fullmatch(name) else 'NAME'} HOST:PORT`",
        )

    def add(self, name: str, target: str) -> Device:
        """Adds a device or gives a known one a new address; raises EdgellmError if either is malformed."""
        if not _NAME.fullmatch(name):
            raise EdgellmError(f"not a device name: {name!r:.80}", "use letters, digits, '.', '_' and '-'")
        device = Device(name, _checked_target(target))
        self._write({known.name: known for known in self.all()} | {name: device})
        return device

    def remove(self, name: str) -> Device:
        """Forgets a device; raises UnknownDeviceError."""
        devices = {known.name: known for known in self.all()}
        device = devices.pop(name, None) or self.find(name)
        self._write(devices)
        return device

    def _write(self, devices: dict[str, Device]) -> None:
        entries = {name: {"target": devices[name].target} for name in sorted(devices)}
        paths.write_atomically(self.path, tomli_w.dumps({"devices": entries}).encode())


def _checked_target(target: object) -> str:
    match = _TARGET.fullmatch(target) if isinstance(target, str) else None
    if match is None or not 0 < int(match["port"] or 1) < 65536:
        raise EdgellmError(
            f"not an address: {target!r:.80}",
            "write unix:///run/edgellm/agent.sock, or HOST:PORT",
        )
    return match.string
