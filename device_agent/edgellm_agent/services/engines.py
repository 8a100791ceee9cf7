"""EngineService: what is done with the engines that are here; pushes are in `services.push`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from edgellm.v1 import engines_pb2
from edgellm_agent.access.caller import current
from edgellm_agent.lifecycle.activation import OnPhase, Phase
from edgellm_agent.lifecycle.library import StoredEngine
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.origin import Origin
from edgellm_agent.services import status
from edgellm_agent.services.messages import engine_message, history_message, phase_message
from edgellm_agent.services.push import PushMethods

_HISTORY = 100
_MOST_HISTORY = 10_000


class EngineServicer(PushMethods):
    """Activate, go back, list, remove, pin, hold."""

    def __init__(self, manager: EngineManager) -> None:
        self._manager = manager
        self._activations: set[asyncio.Future[StoredEngine]] = set()

    async def close(self) -> None:
        """Ends activations that nobody waits for any more."""
        for task in self._activations:
            task.cancel()
        await asyncio.gather(*self._activations, return_exceptions=True)

    @status.stream
    async def Activate(
        self,
        request: engines_pb2.ActivateRequest,
        context: status.Context,
    ) -> AsyncGenerator[engines_pb2.ActivateResponse, None]:
        async with aclosing(
            self._phases(
                lambda on_phase: self._manager.activate(
                    request.engine, on_phase, _caller(), beside=request.beside, force=request.force
                ),
                until_committed=request.until_committed,
            )
        ) as phases:
            async for phase in phases:
                yield phase

    @status.stream
    async def Rollback(
        self, request: engines_pb2.RollbackRequest, context: status.Context
    ) -> AsyncGenerator[engines_pb2.RollbackResponse, None]:
        async with aclosing(
            self._phases(
                lambda on_phase: self._manager.roll_back(on_phase, _caller(), force=request.force),
                until_committed=request.until_committed,
            )
        ) as phases:
            async for phase in phases:
                yield engines_pb2.RollbackResponse(step=phase)

    @status.unary
    async def Deactivate(
        self, request: engines_pb2.DeactivateRequest, context: status.Context
    ) -> engines_pb2.DeactivateResponse:
        await self._manager.deactivate(request.engine, _caller(), force=request.force)
        return engines_pb2.DeactivateResponse()

    @status.unary
    async def ListEngines(
        self,
        request: engines_pb2.ListEnginesRequest,
        context: status.Context,
    ) -> engines_pb2.ListEnginesResponse:
        return engines_pb2.ListEnginesResponse(
            engines=[engine_message(self._manager, e) for e in self._manager.engines()]
        )

    @status.unary
    async def RemoveEngine(
        self,
        request: engines_pb2.RemoveEngineRequest,
        context: status.Context,
    ) -> engines_pb2.RemoveEngineResponse:
        return engines_pb2.RemoveEngineResponse(freed_bytes=self._manager.remove(request.engine, _caller()))

    @status.unary
    async def PinEngine(
        self,
        request: engines_pb2.PinEngineRequest,
        context: status.Context,
    ) -> engines_pb2.PinEngineResponse:
        self._manager.pin(request.pinned, _caller())
        return engines_pb2.PinEngineResponse(
            pinned=request.pinned, active_engine=self._manager.active_digest() or ""
        )

    @status.unary
    async def ListHistory(
        self, request: engines_pb2.ListHistoryRequest, context: status.Context
    ) -> engines_pb2.ListHistoryResponse:
        rows = self._manager.history(min(request.limit or _HISTORY, _MOST_HISTORY))
        return engines_pb2.ListHistoryResponse(entries=[history_message(row) for row in rows])

    @status.stream
    async def HoldEngines(
        self, request: engines_pb2.HoldEnginesRequest, context: status.Context
    ) -> AsyncGenerator[engines_pb2.HoldEnginesResponse, None]:
        with self._manager.holds.held(current().name, request.reason):
            yield engines_pb2.HoldEnginesResponse()
            await self._manager.holds.ended()

    async def _phases(
        self, change: Callable[[OnPhase], Awaitable[StoredEngine]], *, until_committed: bool
    ) -> AsyncGenerator[engines_pb2.ActivateResponse, None]:
        """The phases of a change, up to the engine's first answer, or to the end of its probation."""
        phases: asyncio.Queue[Phase | None] = asyncio.Queue()
        # A task of its own: an activation goes on when the link to the client drops.
        task: asyncio.Future[StoredEngine] = asyncio.ensure_future(change(phases.put_nowait))
        self._activations.add(task)
        task.add_done_callback(self._activations.discard)
        task.add_done_callback(lambda _: phases.put_nowait(None))
        last: Phase | None = None
        while (phase := await phases.get()) is not None:
            last = phase
            yield phase_message(phase)
        stored = await task
        if until_committed and last is not None and last.phase == engines_pb2.ACTIVATION_PHASE_PROBATION:
            await self._manager.proven(stored)
            elapsed_s = last.elapsed_s + last.probation_s
            yield phase_message(Phase(engines_pb2.ACTIVATION_PHASE_COMMITTED, elapsed_s, last.plan))


def _caller() -> Origin:
    """Who asks, for the history."""
    return Origin("local", actor=current().name)
