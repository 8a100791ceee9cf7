"""Reads manifests and blobs over HTTP(S): ranges, redirects, credentials, bounds and deadlines.

One class serves a server of files and a registry: they differ in their addresses (`oci.py` has the
registry's) and in how they ask for credentials, which HTTP itself tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from edgellm.bundle.layout import INDEX_FILE
from edgellm.bundle.manifest import MANIFEST_MEDIA_TYPE, MAX_MANIFEST_BYTES, Descriptor
from edgellm_agent.desired.attestations import Addresses, Attestations
from edgellm_agent.desired.base import RangeError, SourceError, WrongBytesError
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.desired.sources import Source

# They log addresses, and those of object storage are signed: whoever reads one may fetch.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_CONNECT_S = 15.0
_PIECE_BYTES = 256 << 10
_MAX_REDIRECTS = 5
# In `stall_s` so much must come: a server that sends a byte now and then is as good as silent.
_LEAST_BYTES = 4096
_LONGEST_RETRY_AFTER_S = 3600.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)")
_UNSATISFIED_RANGE = re.compile(r"bytes \*/(\d{1,15})")


class Credentials(Protocol):
    """Answers a source that asks who we are."""

    async def header(self, client: httpx.AsyncClient, challenges: list[str]) -> str | None:
        """An Authorization header for a 401's challenges; None if there is none."""


class FileAddresses:
    """An OCI layout on a server of files: the manifest is a blob like the others."""

    def __init__(self, source: Source) -> None:
        self._base = "/".join((source.origin, *source.segments))

    def manifest(self, digest: str) -> str:
        """As `blob`."""
        return self.blob(digest)

    def blob(self, digest: str) -> str:
        """Address of a blob."""
        return f"{self._base}/blobs/{digest.replace(':', '/')}"

    def lists(self, digest: str) -> tuple[str, ...]:  # noqa: ARG002
        """The bundle's index, which has those of all its engines."""
        return (f"{self._base}/{INDEX_FILE}",)


def new_client(settings: DesiredSettings) -> httpx.AsyncClient:
    """A client that trusts what the settings name and nothing of the environment; raises OSError.

    Proxies and `.netrc` of the environment are not used: a service should not change its ways with the shell
    that started it.
    """
    return httpx.AsyncClient(
        verify=ssl.create_default_context(cafile=settings.ca_file),
        timeout=httpx.Timeout(settings.stall_s, connect=min(_CONNECT_S, settings.stall_s)),
        headers={"User-Agent": "edgellm-agent", "Accept-Encoding": "identity"},
        follow_redirects=False,
        trust_env=False,
    )


class HttpSource:
    """A BlobSource; see `base`."""

    def __init__(
        self, client: httpx.AsyncClient, addresses: Addresses, credentials: Credentials, stall_s: float
    ) -> None:
        self._client = client
        self._addresses = addresses
        self._credentials = credentials
        self._stall_s = stall_s
        self._authorization: str | None = None
        self._etags: dict[str, str] = {}

    async def manifest(self, digest: str) -> bytes:
        """The manifest's bytes."""
        return await self._small(self._addresses.manifest(digest), MANIFEST_MEDIA_TYPE, MAX_MANIFEST_BYTES)

    def attestations(self, digest: str) -> AsyncGenerator[bytes, None]:
        """The envelopes that the source has about an engine."""
        return Attestations(self._addresses, self._small).of(digest)

    async def _small(self, url: str, accept: str, max_bytes: int) -> bytes:
        """A document, whole and bounded; nothing about it has been checked."""
        async with self._get(url, {"Accept": accept}) as response:
            _check_ok(response)
            data = bytearray()
            async with contextlib.aclosing(self._pieces(response)) as pieces:
                async for piece in pieces:
                    data += piece
                    if len(data) > max_bytes:
                        raise SourceError(
                            f"{response.url.path} has more than {max_bytes:,} bytes", permanent=True
                        )
        return bytes(data)

    @asynccontextmanager
    async def blob(self, blob: Descriptor, offset: int) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """The blob's bytes from an offset on."""
        headers: dict[str, str] = {}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if (etag := self._etags.get(blob.digest)) is not None:
                headers["If-Range"] = etag
        async with self._get(self._addresses.blob(blob.digest), headers) as response:
            if offset:
                _check_range(response, offset, blob.size_bytes)
            else:
                _check_whole(response, blob.size_bytes)
            if (etag := response.headers.get("ETag", "")).startswith('"'):
                self._etags[blob.digest] = etag
            async with contextlib.aclosing(self._pieces(response)) as pieces:
                yield pieces

    async def _pieces(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """The body as it comes; raises SourceError when it stalls or is cut."""
        now = asyncio.get_running_loop().time
        piece, seen, window_ends = bytearray(), 0, now() + self._stall_s
        try:
            async for part in response.aiter_raw():
                piece += part
                seen += len(part)
                if now() >= window_ends:
                    if seen < _LEAST_BYTES:
                        raise SourceError(f"only {seen} bytes came in {self._stall_s:g} s")
                    seen, window_ends = 0, now() + self._stall_s
                if len(piece) >= _PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
                    # The time that the reader takes is not the source's.
                    seen, window_ends = 0, now() + self._stall_s
            yield bytes(piece)
        except httpx.HTTPError as error:
            yield bytes(piece)
            raise _unreachable(error, self._stall_s) from None

    @asynccontextmanager
    async def _get(self, url: str, headers: dict[str, str]) -> AsyncGenerator[httpx.Response, None]:
        """The response to a GET, with credentials if they are asked for, behind redirects."""
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                response = await stack.enter_async_context(self._followed(url, headers, self._authorization))
                if response.status_code != 401:
                    break
                if _origin(str(response.url)) != _origin(url):
                    break  # whoever we were sent to may not ask for what the source may ask for
                challenges = response.headers.get_list("WWW-Authenticate")
                fresh = await self._credentials.header(self._client, challenges)
                if fresh is None or fresh == self._authorization:
                    break
                self._authorization = fresh
            yield response

    @asynccontextmanager
    async def _followed(
        self, url: str, headers: dict[str, str], authorization: str | None
    ) -> AsyncGenerator[httpx.Response, None]:
        for _ in range(_MAX_REDIRECTS + 1):
            own = {} if authorization is None else {"Authorization": authorization}
            try:
                request = self._client.build_request("GET", url, headers={**headers, **own})
                response = await self._client.send(request, stream=True)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise _unreachable(error, self._stall_s) from None
            if not response.has_redirect_location:
                try:
                    yield response
                finally:
                    await response.aclose()
                return
            await response.aclose()
            target = _redirect(url, response.headers["Location"])
            if _origin(target) != _origin(url):
                authorization = None
            url = target
        raise SourceError(f"more than {_MAX_REDIRECTS} redirects")


def _redirect(url: str, location: str) -> str:
    """Where a redirect leads: over TLS anywhere, without it only to the same server."""
    try:
        target = str(httpx.URL(url).join(location))
        parts = urlsplit(target)
        same = _origin(target) == _origin(url)
    except (httpx.InvalidURL, ValueError):
        raise SourceError("redirected to what is no address") from None
    if parts.username is not None or (parts.scheme != "https" and not same):
        raise SourceError(f"redirected to {_origin(target)}, which is not trusted: not https", permanent=True)
    return target


def _origin(url: str) -> str:
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname}:{port}"


def _check_ok(response: httpx.Response) -> None:
    """Raises SourceError for every status but 200 and 206."""
    status = response.status_code
    if status in {200, 206}:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise SourceError(f"the source sends {encoding!r:.40}, though it was asked not to")
        return
    host = response.url.host
    if status in {401, 403}:
        raise SourceError(f"{host} refuses this device ({status}); see credentials_file", permanent=True)
    if status in {404, 410}:
        raise SourceError(f"{host} does not have {response.url.path} ({status})", absent=True)
    # A registry without an API may also say 400 or 405.
    absent = 400 <= status < 500 and status not in {408, 425, 429}
    raise SourceError(f"{host} answers {status}", retry_after_s=_retry_after_s(response), absent=absent)


def _check_range(response: httpx.Response, offset: int, size_bytes: int) -> None:
    """Raises RangeError unless what comes is all from `offset` on."""
    if response.status_code == 416:
        match = _UNSATISFIED_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is not None and int(match[1]) != size_bytes:
            raise WrongBytesError(f"the source has {int(match[1]):,} bytes, the manifest says {size_bytes:,}")
        raise RangeError
    _check_ok(response)
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or match is None:
        raise RangeError
    if (int(match[1]), int(match[2])) != (offset, size_bytes - 1) or match[3] not in {"*", str(size_bytes)}:
        raise RangeError


def _check_whole(response: httpx.Response, size_bytes: int) -> None:
    _check_ok(response)
    if response.status_code == 206:
        raise SourceError(f"{response.url.host} answers with a range that nobody asked for")
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length[:16]) != size_bytes:
        raise WrongBytesError(f"the source has {length:.16} bytes, the manifest says {size_bytes:,}")


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that the source asks for; a date, which a wrong clock would misread, counts for nothing."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), _LONGEST_RETRY_AFTER_S) if re.fullmatch(r"\d{1,9}", text) else 0.0


def _unreachable(error: Exception, stall_s: float) -> SourceError:
    if isinstance(error, httpx.ReadTimeout):
        return SourceError(f"nothing came for {stall_s:g} s")
    # httpx leaves some of its messages empty.
    return SourceError(f"{type(error).__name__}: {error}"[:300].removesuffix(": "))
