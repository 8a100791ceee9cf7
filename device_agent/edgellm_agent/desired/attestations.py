"""Finds what a source has about an engine: lists of manifests, the manifests of attestations, the envelopes.

A list is only a hint where to look. What is used came by a digest and was checked against it, and names the
engine as its subject; whose word it is, trust decides. What does not fit is passed over and logged.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import INDEX_MEDIA_TYPE, MANIFEST_MEDIA_TYPE, Descriptor
from edgellm.bundle.referrers import (
    ATTESTATION_TYPE,
    MAX_ATTESTATION_BYTES,
    MAX_LIST_BYTES,
    MAX_REFERRER_BYTES,
    Referrer,
    parse_list,
)
from edgellm.errors import BundleError
from edgellm_agent.desired.base import SourceError

log = logging.getLogger(__name__)

# A registry keeps those of each build of an engine, and a copy of a whole bundle lists its engines too.
_MAX_CANDIDATES = 256
_MAX_NESTED = 4

Read = Callable[[str, str, int], Awaitable[bytes]]
"""Address, media type, most bytes."""


class Addresses(Protocol):
    """Where a source keeps things, below its origin."""

    def manifest(self, digest: str) -> str: ...
    def blob(self, digest: str) -> str: ...
    def lists(self, digest: str) -> tuple[str, ...]:
        """Where manifests that may be about an engine are listed; the first list that is there counts."""


class Attestations:
    """Of one source; raises SourceError only where trying again may help."""

    def __init__(self, addresses: Addresses, read: Read) -> None:
        self._addresses = addresses
        self._read = read

    async def of(self, digest: str) -> AsyncGenerator[bytes, None]:
        """The envelopes about an engine, in the order of the list, whose end is usually the latest."""
        for candidate in await self._candidates(digest):
            envelope = await self._envelope(candidate, digest)
            if envelope is not None:
                yield envelope

    async def _candidates(self, digest: str) -> list[Descriptor]:
        listed: list[Descriptor] = []
        for address in self._addresses.lists(digest):
            data = await self._document(address, INDEX_MEDIA_TYPE, MAX_LIST_BYTES)
            if data is not None:
                listed = _listed(data, address)
                break
        nested = [blob for blob in listed if blob.media_type == INDEX_MEDIA_TYPE]
        for blob in nested[:_MAX_NESTED]:
            address = self._addresses.manifest(blob.digest)
            data = await self._checked(address, blob, MAX_LIST_BYTES)
            listed += [] if data is None else _listed(data, address)
        manifests = {
            b.digest: b for b in listed if b.media_type == MANIFEST_MEDIA_TYPE and b.digest != digest
        }
        if len(manifests) > _MAX_CANDIDATES:
            log.warning("attestations.too_many engine=%s the last %d are read", digest, _MAX_CANDIDATES)
        return list(manifests.values())[-_MAX_CANDIDATES:]

    async def _envelope(self, candidate: Descriptor, digest: str) -> bytes | None:
        address = self._addresses.manifest(candidate.digest)
        data = await self._checked(address, candidate, MAX_REFERRER_BYTES)
        if data is None:
            return None
        try:
            referrer = Referrer.parse(data)
        except BundleError as error:
            log.info("attestations.passed_over %s: %s", address, error)
            return None
        if referrer.subject != digest:
            return None
        return await self._checked(
            self._addresses.blob(referrer.envelope.digest), referrer.envelope, MAX_ATTESTATION_BYTES
        )

    async def _checked(self, address: str, blob: Descriptor, max_bytes: int) -> bytes | None:
        data = await self._document(address, blob.media_type, max_bytes)
        if data is None or digests.of_bytes(data) == blob.digest:
            return data
        log.warning("attestations.passed_over %s does not have its digest", address)
        return None

    async def _document(self, address: str, accept: str, max_bytes: int) -> bytes | None:
        """None where there is nothing to be had, now or later."""
        try:
            return await self._read(address, accept, max_bytes)
        except SourceError as error:
            if not (error.permanent or error.absent):
                raise
            log.info("attestations.none %s: %s", address, error)
            return None


def _listed(data: bytes, address: str) -> list[Descriptor]:
    try:
        return parse_list(data, "list of attestations")
    except BundleError as error:
        log.warning("attestations.passed_over %s: %s", address, error)
        return []


def filtered(address: str) -> str:
    """The referrers API's address, asking for attestations only."""
    return f"{address}?artifactType={ATTESTATION_TYPE.replace('/', '%2F').replace('+', '%2B')}"
