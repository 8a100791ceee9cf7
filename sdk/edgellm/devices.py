"""The devices that this machine knows by name: `devices.toml`, each with the way to its agent."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from edgellm import paths, toml
from edgellm.errors import EdgellmError, UnknownDeviceError

AGENT_SOCKET = "/run/edgellm/agent.sock"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9._-]*"
_TCP = re.compile(rf"(?P<host>{_HOST}):(?P<port>\d{{1,5}})")
# Neither user nor host begins with '-': ssh would take it for an option.
_SSH = re.compile(
    rf"ssh://((?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?(?P<host>{_HOST})(:(?P<port>\d{{1,5}}))?"
    r"(?P<socket>(/[A-Za-z0-9._+@-]+)+)?/?"
)
_UNIX = re.compile(r"unix:///\S+")
_HOW = "write ssh://[USER@]HOST, HOST:PORT, or unix:///run/edgellm/agent.sock"


@dataclass(frozen=True)
class TlsFiles:
    """As whom, and trusting whom, a device is spoken to; what is None comes from `config_dir()/pki`.

    Args:
        ca_file: The authority that issued the device's certificate.
        cert_file: Our certificate; its role is what the device lets us do.
        key_file: The key to it.
        server_name: Name in the device's certificate; empty means the device's name in the book.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""


@dataclass(frozen=True)
class Device:
    """A device and how its agent is reached.

    Args:
        name: Its name on this machine, or its address if it has none.
        target: `unix:///run/edgellm/agent.sock`, `host:port` (TLS, both sides show a certificate), or
            `ssh://[user@]host[:port][/path/to/agent.sock]`.
        groups: Names under which several devices are meant at once.
        tls: For `host:port` only; None means our own certificate in `config_dir()/pki`.
    """

    name: str
    target: str
    groups: tuple[str, ...] = ()
    tls: TlsFiles | None = None

    @property
    def over(self) -> str:
        """How it is reached: "unix", "ssh" or "tls"."""
        scheme = self.target.partition(":")[0]
        return scheme if scheme in {"unix", "ssh"} else "tls"


@dataclass(frozen=True)
class SshTarget:
    """Where ssh goes, and which socket it reaches there."""

    host: str
    user: str | None = None
    port: int | None = None
    socket: str = AGENT_SOCKET

    @classmethod
    def parse(cls, target: str) -> SshTarget:
        """From `ssh://[user@]host[:port][/path/to/agent.sock]`; raises EdgellmError."""
        match = _SSH.fullmatch(_checked_target(target))
        if match is None:
            raise EdgellmError(
                f"not an ssh address: {target!r:.80}", "write ssh://[USER@]HOST[:PORT][/SOCKET]"
            )
        port = match["port"]
        return cls(
            match["host"].strip("[]"),
            match["user"],
            None if port is None else int(port),
            match["socket"] or AGENT_SOCKET,
        )


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
            return [_from_entry(name, entries[name]) for name in sorted(entries)]
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
        if _is_address(name):
            return Device(name, name)
        devices = self.all()
        for device in devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in devices) or "none"
        raise UnknownDeviceError(
            f"unknown device {name!r:.80}; known: {known}",
            f"add it with `edgellm device add {name if _NAME.fullmatch(name) else 'NAME'} ssh://USER@HOST`",
        )

    def group(self, name: str) -> list[Device]:
        """The devices of a group, by name; raises UnknownDeviceError, which lists the known groups."""
        devices = self.all()
        members = [device for device in devices if name in device.groups]
        if members:
            return members
        known = ", ".join(sorted({group for device in devices for group in device.groups})) or "none"
        raise UnknownDeviceError(
            f"no device is in a group {name!r:.80}; known groups: {known}",
            "put devices into it with `edgellm device add NAME TARGET --group GROUP`",
        )

    def add(
        self, name: str, target: str, *, groups: Iterable[str] | None = None, tls: TlsFiles | None = None
    ) -> Device:
        """Adds a device, or gives a known one a new address.

        Of a known device, groups stay if None are given, and TLS files while the address still is HOST:PORT.
        Raises EdgellmError that says what is malformed.
        """
        if not _NAME.fullmatch(name):
            raise EdgellmError(f"not a device name: {name!r:.80}", "use letters, digits, '.', '_' and '-'")
        devices = {known.name: known for known in self.all()}
        known = devices.get(name, Device(name, target))
        groups = known.groups if groups is None else tuple(sorted(set(groups)))
        device = _checked(Device(name, target, groups, tls))
        if tls is None and device.over == "tls":
            device = Device(name, target, groups, known.tls)
        self._write(devices | {name: device})
        return device

    def remove(self, name: str) -> Device:
        """Forgets a device; raises UnknownDeviceError."""
        devices = {known.name: known for known in self.all()}
        device = devices.pop(name, None) or self.find(name)
        self._write(devices)
        return device

    def _write(self, devices: dict[str, Device]) -> None:
        entries = {name: _to_entry(devices[name]) for name in sorted(devices)}
        paths.write_atomically(self.path, tomli_w.dumps({"devices": entries}).encode())


def is_name(text: str) -> bool:
    """Whether a device, a group or the holder of a certificate may be called that."""
    return _NAME.fullmatch(text) is not None


def _to_entry(device: Device) -> dict[str, object]:
    entry: dict[str, object] = {"target": device.target}
    if device.groups:
        entry["groups"] = list(device.groups)
    if device.tls is not None:
        entry["tls"] = {name: str(value) for name, value in asdict(device.tls).items() if value}
    return entry


def _from_entry(name: str, entry: Mapping[str, Any]) -> Device:
    tls = entry.get("tls")
    return _checked(
        Device(
            name,
            entry["target"],
            tuple(entry.get("groups", ())),
            None if tls is None else _tls_from_entry(tls),
        )
    )


def _tls_from_entry(entry: Mapping[str, str]) -> TlsFiles:
    files = {name: Path(entry[name]) for name in ("ca_file", "cert_file", "key_file") if name in entry}
    return TlsFiles(**files, server_name=entry.get("server_name", ""))


def _checked(device: Device) -> Device:
    """The device; raises EdgellmError that names what cannot be."""
    _checked_target(device.target)
    for group in device.groups:
        if not isinstance(group, str) or not _NAME.fullmatch(group):
            raise EdgellmError(f"not a group's name: {group!r:.80}", "use letters, digits, '.', '_' and '-'")
    if device.tls is not None:
        if device.over != "tls":
            raise EdgellmError(
                f"{device.target} takes no certificate: TLS is for HOST:PORT",
                "leave --ca, --cert, --key and --server-name out",
            )
        if (device.tls.cert_file is None) != (device.tls.key_file is None):
            raise EdgellmError(
                "a certificate needs its key, and a key its certificate", "give --cert and --key"
            )
    return device


def _is_address(text: object) -> bool:
    """Whether it is an address rather than a name."""
    if not isinstance(text, str):
        return False
    match = _TCP.fullmatch(text) or _SSH.fullmatch(text)
    if match is None:
        return _UNIX.fullmatch(text) is not None
    return 0 < int(match["port"] or 22) < 65536


def _checked_target(target: object) -> str:
    if not _is_address(target):
        raise EdgellmError(f"not an address: {target!r:.80}", _HOW)
    return str(target)
