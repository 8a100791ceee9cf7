"""Both clients behind one face, so that the sync and the async one take the same tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edgellm.client import AsyncClient, Client


class Blocking:
    """Runs the sync client where the tests await."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        method = getattr(self._client, name)

        async def call(*args, **kwargs):
            return await asyncio.to_thread(method, *args, **kwargs)

        return call


@asynccontextmanager
async def connected(kind: str, target, **options) -> AsyncIterator:
    """A client of that kind, "sync" or "async"."""
    if kind == "sync":
        with Client(target, **options) as client:
            yield Blocking(client)
    else:
        async with AsyncClient(target, **options) as client:
            yield client
