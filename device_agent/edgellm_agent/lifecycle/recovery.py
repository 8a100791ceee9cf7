"""Has the engines in memory that should be: after a start of the agent, and after one of them has failed."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Coroutine

from edgellm.errors import BundleError
from edgellm_agent.errors import DataLossError, EngineError, NotFoundError
from edgellm_agent.lifecycle.activation import Activator
from edgellm_agent.lifecycle.library import Library
from edgellm_agent.lifecycle.rack import Loaded, Rack
from edgellm_agent.lifecycle.succession import Succession
from edgellm_agent.origin import LOCAL
from edgellm_agent.registry import Registry

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
# So often may a proven engine fail to load before the one before it is tried.
_FAILED_STARTS = 3
_FAULTS = (EngineError, DataLossError, NotFoundError, BundleError)


class Recovery:
    """Brings engines back; what is to be the active one is the succession's to say.

    Args:
        rack: The engines in memory.
        library: Those on the disk.
        activator: Loads them.
        registry: Says which should be in memory.
        succession: Says which comes after one that fails.
        turn: Held while what runs is changed.
    """

    def __init__(
        self,
        rack: Rack,
        library: Library,
        activator: Activator,
        *,
        registry: Registry,
        succession: Succession,
        turn: asyncio.Lock,
    ) -> None:
        self._rack = rack
        self._library = library
        self._activator = activator
        self._registry = registry
        self._succession = succession
        self._turn = turn
        self._tasks: set[asyncio.Task[None]] = set()

    async def bring_back(self) -> None:
        """Loads the active engine, and those that answered beside it as far as memory allows.

        Goes on until the active one runs, or the one before it, or another one was activated.
        """
        await self._bring_back_active()
        for digest in self._registry.beside():
            async with self._turn:
                if digest not in self._registry.beside() or digest in self._rack.beside:
                    continue
                try:
                    self._rack.put_beside(await self._rack.load(self._library.find(digest), beside=True))
                except Exception as error:  # noqa: BLE001 - the others shall come all the same
                    log.error("engine.does_not_start engine=%s error=%s", digest, error)

    def bring_back_soon(self) -> None:
        """In the background, since whoever finds that no engine runs has the turn."""
        self._begin(self._bring_back_active())

    def failing(self, loaded: Loaded, reason: str) -> None:
        """An engine does not work: the device goes back, in the background, since its watcher tells it."""
        self._begin(self._give_up(loaded, reason))

    async def close(self) -> None:
        """Stops what goes on in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("engine.recovery_ended", exc_info=error)

    async def _bring_back_active(self) -> None:
        pause_s, attempts = _FIRST_PAUSE_S, 0
        while not self._succession.leaving and self._rack.default is None:
            digest = self._registry.active()
            if digest is None:
                return
            try:
                await self._load(digest)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may find it gone
                log.error("engine.does_not_start engine=%s error=%s", digest, error)
                # Too little memory or a disk that fails for now says nothing of the engine.
                attempts += isinstance(error, _FAULTS)
                reason = str(error)
            # One on probation has had its chance.
            enough = 1 if self._succession.pending(digest) is not None else _FAILED_STARTS
            if attempts >= enough and self._fails(digest, reason):
                pause_s, attempts = _FIRST_PAUSE_S, 0
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _load(self, digest: str) -> None:
        async with self._turn:
            if self._rack.default is not None or self._registry.active() != digest:
                return
            loaded = self._rack.serving(digest)
            # One that answers beside the default engine is in memory already.
            if loaded is None:
                stored = self._library.find(digest)
                await self._library.verify(stored)
                loaded = await self._activator.load(stored)
                await self._activator.tried(loaded)
            await self._activator.put(loaded)

    async def _give_up(self, loaded: Loaded, reason: str) -> None:
        digest = loaded.stored.digest
        while not self._succession.leaving:
            async with self._turn:
                if self._rack.beside.get(digest) is loaded:
                    await self._activator.take_beside(digest, LOCAL, reason)
                    return
                # It may have been replaced while this waited for its turn.
                if self._rack.default is not loaded:
                    return
                if self._fails(digest, reason):
                    await self._rack.take(loaded, at_once=True)
                    break
                if self._succession.pending(digest) is None:
                    return  # there is nothing to go back to, which is written
            # Not while it has the turn: a full disk is freed by removing an engine.
            await asyncio.sleep(_LONGEST_PAUSE_S)
        await self._bring_back_active()

    def _fails(self, digest: str, reason: str) -> bool:
        """Goes back on the disk; tells whether another engine is the active one now."""
        try:
            return self._succession.fail(digest, reason)
        except sqlite3.Error as error:
            log.error("engine.not_rolled_back engine=%s: %s", digest, error)
            return False
