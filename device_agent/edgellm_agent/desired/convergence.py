"""The work for one desired generation: bring its engine here, activate it, try again after what may pass."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import ModuleType
from typing import TYPE_CHECKING

from edgellm.errors import BundleError, DoesNotFitError
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.desired import rules
from edgellm_agent.desired.base import SourceError
from edgellm_agent.desired.settings import DesiredSettings
from edgellm_agent.desired.sources import AllowList, Source, parse_source
from edgellm_agent.errors import (
    AgentError,
    BusyError,
    ConflictError,
    DataLossError,
    DeniedError,
    HeldError,
    NotFoundError,
    PreconditionError,
    TooLargeError,
    UnavailableError,
    UntrustedError,
)
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.origin import Origin, PinnedError
from edgellm_agent.store import StoreError

if TYPE_CHECKING:
    from edgellm_agent.desired.fetch import Fetcher

log = logging.getLogger(__name__)

_UNEXPECTED = "the agent failed; its log says more"
# A device that is still pinned does not get to the next attempt; a hold, heat and a disk that fails may pass.
_PASSING = (BusyError, ConflictError, PinnedError, HeldError, UnavailableError, StoreError)
# What was changed on disk was dropped: it is fetched again, but not for ever.
_BAD_FILES = (DataLossError, NotFoundError)
_REFUSALS = (DeniedError, PreconditionError, DoesNotFitError, TooLargeError, BundleError)


class Convergence:
    """Works until the generation is reached, has failed, or is no longer asked for.

    Args:
        settings: Allow-list and how to fetch.
        manager: Whose engines these are.
        state: Of the rules; names generation, engine and source.
        tell: Takes what became of each attempt.
        asked: Whether the generation is still to be worked for.
        fleet: What the fleet may do here at all.
    """

    def __init__(
        self,
        settings: DesiredSettings,
        manager: EngineManager,
        state: rules.State,
        *,
        tell: Callable[[rules.Tried], None],
        asked: Callable[[], bool],
        fleet: Fleet,
    ) -> None:
        self._fleet = fleet
        self.generation = state.generation
        self.activating = False
        self._settings = settings
        self._manager = manager
        self._engine = state.engine
        self._source = state.source
        self._tell = tell
        self._asked = asked
        self._by = Origin("desired", state.generation)
        self._fetcher: Fetcher | None = None
        self._pause_s = settings.retry_first_s

    def progress(self) -> tuple[int, int]:
        """Bytes of the engine that are on the device, and all of them; zeros while that is not known."""
        return (0, 0) if self._fetcher is None else self._fetcher.progress()

    async def run(self) -> None:
        """Works; may be cancelled, but while `activating` only with the whole agent."""
        async with AsyncExitStack() as stack:
            while self._asked():
                self._tell(rules.Tried(self.generation, "FETCHING"))
                fetched_bytes, _ = self.progress()
                tried, least_s = await self._attempt(stack)
                if tried is None:
                    return
                if self.progress()[0] > fetched_bytes:
                    self._pause_s = self._settings.retry_first_s
                self._tell(tried)
                if self._asked():
                    await asyncio.sleep(max(least_s, self._next_pause_s()))

    async def _attempt(self, stack: AsyncExitStack) -> tuple[rules.Tried | None, float]:
        """What became of an attempt, None if it went well; and for how long the source wants no other, s."""
        try:
            for method in ("EngineService/Prepare", "EngineService/Activate"):
                self._fleet.check(method)
            await self._bring(stack)
        except SourceError as error:
            return self._ended("FAILED" if error.permanent else "RETRYING", str(error)), error.retry_after_s
        except _REFUSALS as error:
            return self._ended("REFUSED", str(error)), 0
        except (AgentError, OSError) as error:
            return self._ended("RETRYING", str(error)), 0
        except Exception:
            log.exception("desired.fetch_failed generation=%d", self.generation)
            return self._ended("RETRYING", _UNEXPECTED), 0
        tried = await self._activate()
        # What was put off, or is no longer asked for, has not been done.
        if tried is None or tried.phase == "FAILED":
            failure = None if tried is None else PreconditionError(tried.error)
            await self._fleet.did("EngineService/Activate", self._engine, failure)
        return tried, 0

    async def _bring(self, stack: AsyncExitStack) -> None:
        """Has the engine whole on the device."""
        if self._is_whole():
            return
        if self._fetcher is None:
            source = self._allowed_source()
            # An agent that fetches nothing shall not pay for the libraries that it takes.
            fetch = await asyncio.to_thread(_import_fetch)
            blobs = await stack.enter_async_context(fetch.open_source(self._settings, source))
            limit = self._settings.max_bytes_per_s
            self._fetcher = fetch.Fetcher(self._manager, blobs, self._engine, self._by, limit)
        await self._fetcher.fetch()

    async def _activate(self) -> rules.Tried | None:
        await self._manager.idle()
        if not self._asked():
            return None
        self.activating = True
        self._tell(rules.Tried(self.generation, "ACTIVATING"))
        try:
            await self._manager.activate(self._engine, by=self._by)
        except (AgentError, DoesNotFitError) as error:
            return rules.Tried(
                self.generation, _ending(error), str(error), setback=isinstance(error, _BAD_FILES)
            )
        except Exception:
            log.exception("desired.activation_failed generation=%d", self.generation)
            return self._ended("FAILED", _UNEXPECTED)
        finally:
            self.activating = False
        return None

    def _is_whole(self) -> bool:
        try:
            stored = self._manager.find(self._engine)
        except AgentError:
            return False
        return not self._manager.store.missing(stored.manifest.blobs())

    def _allowed_source(self) -> Source:
        """Raises PreconditionError."""
        if not self._source:
            raise PreconditionError(f"{self._engine} is not on the device, and no source is given")
        try:
            source = parse_source(self._source)
        except ValueError as error:
            raise PreconditionError(f"source: {error}") from None
        if not AllowList(self._settings.sources).allows(source):
            raise PreconditionError(f"the source {self._source} is not on this device's allow-list")
        return source

    def _ended(self, phase: rules.Ending, error: str) -> rules.Tried:
        if phase in {"FAILED", "REFUSED"}:
            active = self._manager.active_digest() or ""
            with self._manager.journal.entry(phase, self._engine, self._by, previous=active, error=error):
                pass
        else:
            log.info("desired.retrying generation=%d error=%s", self.generation, error)
        return rules.Tried(self.generation, phase, error)

    def _next_pause_s(self) -> float:
        """Doubles up to a bound; spread, so that a fleet does not come back all at once."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._settings.retry_longest_s)
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


def _ending(error: AgentError | DoesNotFitError) -> rules.Ending:
    """Who can help an activation that failed."""
    if isinstance(error, (*_PASSING, *_BAD_FILES)):
        return "RETRYING"
    return "REFUSED" if isinstance(error, UntrustedError) else "FAILED"


def _import_fetch() -> ModuleType:
    from edgellm_agent.desired import fetch  # noqa: PLC0415

    return fetch
