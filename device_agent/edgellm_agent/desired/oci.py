"""The part of the OCI distribution API that reading takes: addresses, bearer tokens, credentials.

Sources: the OCI distribution specification 1.1 (pull), and the token flow of the Docker registry, which
registries share though no specification has it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
from pathlib import Path
from urllib.parse import urlencode

import httpx

from edgellm_agent.desired.attestations import filtered
from edgellm_agent.desired.base import SourceError
from edgellm_agent.desired.sources import AllowList, Source

_MAX_TOKEN_BYTES = 64 << 10
_MAX_FILE_BYTES = 64 << 10
_CHALLENGE = re.compile(r"\s*(?P<scheme>[A-Za-z]+)(\s+(?P<parameters>.*))?")
_PARAMETER = re.compile(r'([A-Za-z_]{1,32})="([^"\\]{0,1024})"')
_VISIBLE = re.compile(r"[\x21-\x7e]+")


class RegistryAddresses:
    """Manifests by digest and blobs of one repository."""

    def __init__(self, source: Source) -> None:
        self._base = f"{source.origin}/v2/{source.path}"

    def manifest(self, digest: str) -> str:
        """Address of a manifest."""
        return f"{self._base}/manifests/{digest}"

    def blob(self, digest: str) -> str:
        """Address of a blob."""
        return f"{self._base}/blobs/{digest}"

    def lists(self, digest: str) -> tuple[str, ...]:
        """The referrers API, and the tag that stands for it in registries without."""
        api, tag = f"{self._base}/referrers/{digest}", digest.replace(":", "-")
        return (filtered(api), f"{self._base}/manifests/{tag}")


class SourceCredentials:
    """Answers Basic and Bearer challenges of one source.

    The password goes to the source itself and to the token service that it names, if that is reached over
    TLS or is on the allow-list.
    """

    def __init__(self, source: Source, allowed: AllowList, file: Path | None) -> None:
        self._source = source
        self._allowed = allowed
        self._file = file

    async def header(self, client: httpx.AsyncClient, challenges: list[str]) -> str | None:
        """An Authorization header; None if the challenges ask for what we do not have. Raises SourceError."""
        basic = self._basic()
        for challenge in challenges:
            match = _CHALLENGE.fullmatch(challenge)
            scheme = match["scheme"].lower() if match is not None else ""
            if scheme == "bearer" and match is not None:
                parameters = dict(_PARAMETER.findall(match["parameters"] or ""))
                return "Bearer " + await self._token(client, parameters, basic)
            if scheme == "basic" and basic is not None:
                return basic
        return None

    async def _token(self, client: httpx.AsyncClient, asked: dict[str, str], basic: str | None) -> str:
        realm = asked.get("realm", "")
        if not self._allowed.allows_token_service(realm):
            raise SourceError(
                f"the token service {realm!r:.200} is neither https nor allowed", permanent=True
            )
        scope = asked.get("scope") or f"repository:{self._source.path}:pull"
        query = {"service": asked["service"]} if "service" in asked else {}
        url = f"{realm}?{urlencode({**query, 'scope': scope})}"
        headers = {} if basic is None else {"Authorization": basic}
        try:
            async with client.stream("GET", url, headers=headers) as response:
                if response.status_code in {401, 403}:
                    refused = f"the token service refuses this device ({response.status_code})"
                    raise SourceError(f"{refused}; see credentials_file", permanent=True)
                if response.status_code != 200:
                    raise SourceError(f"the token service answers {response.status_code}")
                return _token_of(await _bounded(response))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"the token service cannot be asked: {type(error).__name__} {error}") from None

    def _basic(self) -> str | None:
        if self._file is None:
            return None
        encoded = read_credentials(self._file).get(self._source.authority)
        return None if encoded is None else f"Basic {encoded}"


def read_credentials(path: Path) -> dict[str, str]:
    """Host (and port) → base64 of "user:password"; raises SourceError, which never shows the content."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in {0, os.geteuid()}:
                raise SourceError(f"credentials_file {path} can be read by others: chmod 600", permanent=True)
            auths = json.loads(file.read(_MAX_FILE_BYTES))["auths"]
        found = {host: entry["auth"] for host, entry in auths.items() if "auth" in entry}
        for encoded in found.values():
            base64.b64decode(encoded, validate=True)
    except OSError as error:
        raise SourceError(f"credentials_file {path}: {error.strerror}", permanent=True) from None
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise SourceError(
            f"credentials_file {path} is not as `skopeo login` writes it", permanent=True
        ) from None
    return found


async def _bounded(response: httpx.Response) -> bytes:
    data = bytearray()
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > _MAX_TOKEN_BYTES:
            raise SourceError("the token service sends too much")
    return bytes(data)


def _token_of(data: bytes) -> str:
    try:
        document = json.loads(data)
        token = document.get("token") or document.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not _VISIBLE.fullmatch(token):
        raise SourceError("the token service gives no token")
    return token
