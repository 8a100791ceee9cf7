"""Sources of engines, and the allow-list that a source must be on.

A source is `https://host[:port]/path` (a server of files, on which an OCI layout lies) or
`oci://host[:port]/repository` (a registry); `http://` and `oci+http://` are the same without TLS. Only one
spelling of each is understood, so that what is compared is what is fetched: small ASCII letters in the host,
no user, no query, no percent-encoding, no empty, "." or ".." segment.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

_SCHEMES = {"https": 443, "oci": 443, "http": 80, "oci+http": 80}
_SOURCE = re.compile(
    r"(?P<scheme>[a-z+]+)://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]+))?(?P<path>/.*)?"
)
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_SEGMENT = re.compile(r"[A-Za-z0-9_~+@=.-]+")
# As the OCI distribution specification has it.
_REPOSITORY_SEGMENT = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")
_MAX_CHARACTERS = 1024


@dataclass(frozen=True)
class Source:
    """A place on the network, in parts that can be compared."""

    scheme: str
    host: str
    port: int
    segments: tuple[str, ...]

    @property
    def registry(self) -> bool:
        """Whether it is an OCI registry, not a server of files."""
        return self.scheme.startswith("oci")

    @property
    def origin(self) -> str:
        """Scheme, host and port as HTTP has them."""
        scheme = "https" if self.scheme in {"https", "oci"} else "http"
        return f"{scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """Host, and port unless it is the scheme's own."""
        return self.host if self.port == _SCHEMES[self.scheme] else f"{self.host}:{self.port}"

    @property
    def path(self) -> str:
        """The segments with slashes between them."""
        return "/".join(self.segments)

    def covers(self, other: Source) -> bool:
        """Whether `other` is this place or below it."""
        mine, its = (self.scheme, self.host, self.port), (other.scheme, other.host, other.port)
        return mine == its and self.segments == other.segments[: len(self.segments)]


def parse_entry(text: str) -> Source:
    """An entry of the allow-list; raises ValueError, which says what is wrong with it."""
    match = _SOURCE.fullmatch(text) if len(text) <= _MAX_CHARACTERS else None
    if match is None or match["scheme"] not in _SCHEMES:
        raise ValueError(
            f"{text!r:.200} is not https://host[:port]/path or oci://host[:port]/repository"
            " (or http:// or oci+http://) in plain small letters"
        )
    source = Source(match["scheme"], _host(match["host"]), _port(match), _segments(match["path"] or ""))
    pattern = _REPOSITORY_SEGMENT if source.registry else _SEGMENT
    for segment in source.segments:
        if not pattern.fullmatch(segment) or segment in {".", ".."}:
            raise ValueError(f"{text!r:.200}: {segment!r} cannot be part of the path")
    return source


def parse_source(text: str) -> Source:
    """A source; raises ValueError."""
    source = parse_entry(text)
    if source.registry and not source.segments:
        raise ValueError(f"{text!r:.200} names no repository")
    return source


class AllowList:
    """The sources that the device's owner trusts to serve it; digests are checked all the same."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = tuple(parse_entry(entry) for entry in entries)

    def allows(self, source: Source) -> bool:
        """Whether the source is an entry or below one."""
        return any(entry.covers(source) for entry in self._entries)

    def allows_token_service(self, url: str) -> bool:
        """Whether credentials may go there: over TLS, or by a plain entry of the list."""
        try:
            source = parse_entry(url)
        except ValueError:
            return False
        return source.scheme == "https" or (source.scheme == "http" and self.allows(source))


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(text[1:-1])}]"
        except ValueError:
            raise ValueError(f"{text} is not an IPv6 address") from None
    if len(text) > 253 or not _HOST.fullmatch(text):
        raise ValueError(f"{text!r:.200} is not a host name in small ASCII letters")
    return text


def _port(match: re.Match[str]) -> int:
    if match["port"] is None:
        return _SCHEMES[match["scheme"]]
    port = int(match["port"]) if len(match["port"]) <= 5 else 0
    if not 0 < port < 65536 or match["port"].startswith("0"):
        raise ValueError(f"{match['port']:.20} is not a port")
    return port


def _segments(path: str) -> tuple[str, ...]:
    return tuple(path.removesuffix("/").split("/")[1:])
