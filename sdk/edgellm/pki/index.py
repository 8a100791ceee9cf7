"""What an authority has issued and revoked: a file to which entries are added, and none is taken from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from edgellm import paths
from edgellm.errors import EdgellmError

FILE = "index.json"
State = Literal["valid", "expired", "revoked"]


@dataclass(frozen=True)
class Issued:
    """A certificate that was issued.

    Args:
        serial: In lower-case hexadecimal, as OpenSSL prints it.
        name: The common name.
        role: What a client may do; empty for a device.
        sans: Names and addresses of a device.
        at: When it was issued.
        not_after: When it expires.
        revoked_at: When it was revoked; None if it was not.
    """

    serial: str
    name: str
    role: str
    sans: tuple[str, ...]
    at: datetime
    not_after: datetime
    revoked_at: datetime | None = None

    @property
    def is_device(self) -> bool:
        """Whether it is a board's, not a client's."""
        return not self.role

    def state(self, now: datetime) -> State:
        """What has become of it."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.not_after <= now else "valid"


@dataclass(frozen=True)
class Index:
    """All certificates of an authority, the oldest first; `crl_number` counts its revocation lists."""

    entries: tuple[Issued, ...] = ()
    crl_number: int = 0
    events: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """What the folder's index says, nothing if there is none; raises EdgellmError if it is damaged."""
        path = folder / FILE
        try:
            return cls._of(json.loads(path.read_text("utf-8"))["events"])
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError) as error:
            raise EdgellmError(
                f"{path} cannot be read: {type(error).__name__} {error}", "put a copy of it back"
            ) from None

    def save(self, folder: Path) -> None:
        """Replaces the file; raises OSError."""
        text = json.dumps({"events": self.events}, indent=1)
        paths.write_atomically(folder / FILE, text.encode())

    def issued(self, entry: Issued) -> Index:
        """The index with one certificate more."""
        fields = asdict(entry) | {"at": _text(entry.at), "not_after": _text(entry.not_after)}
        del fields["revoked_at"]
        return self._of((*self.events, {"event": "issued", **fields}))

    def revoked(self, serial: str, at: datetime) -> Index:
        """The index with that certificate revoked; once more changes nothing."""
        if any(entry.serial == serial and entry.revoked_at is not None for entry in self.entries):
            return self
        return self._of((*self.events, {"event": "revoked", "serial": serial, "at": _text(at)}))

    def listed(self, at: datetime) -> Index:
        """The index with one revocation list more."""
        number = self.crl_number + 1
        return self._of((*self.events, {"event": "crl", "number": number, "at": _text(at)}))

    def of(self, name_or_serial: str) -> list[Issued]:
        """The certificates of that name, or the one of that serial number."""
        serial = name_or_serial.lower().replace(":", "").lstrip("0")
        return [entry for entry in self.entries if name_or_serial == entry.name or serial == entry.serial]

    @classmethod
    def _of(cls, events: tuple[Mapping[str, Any], ...] | list[Mapping[str, Any]]) -> Index:
        entries: dict[str, Issued] = {}
        number = 0
        for event in events:
            if event["event"] == "issued":
                entries[event["serial"]] = _issued(event)
            elif event["event"] == "revoked":
                entry = entries[event["serial"]]
                entries[entry.serial] = Issued(**{**vars(entry), "revoked_at": _time(event["at"])})
            elif event["event"] == "crl":
                number = max(number, int(event["number"]))
            else:
                raise ValueError(f"unknown event {event['event']!r:.40}")
        return cls(tuple(entries.values()), number, tuple(events))


def _issued(event: Mapping[str, Any]) -> Issued:
    return Issued(
        serial=event["serial"],
        name=event["name"],
        role=event["role"],
        sans=tuple(event["sans"]),
        at=_time(event["at"]),
        not_after=_time(event["not_after"]),
    )


def _text(time: datetime) -> str:
    return time.astimezone(timezone.utc).isoformat(timespec="seconds")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
