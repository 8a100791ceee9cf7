"""The real rack over engines that stand still."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from edgellm.memory import MemoryPlan
from edgellm.v1 import worker_pb2
from edgellm_agent.engine.figures import Health
from edgellm_agent.errors import UnavailableError
from edgellm_agent.lifecycle.rack import Loaded, Rack


class StillEngine:
    """Stands for a running engine where a test is not about running one."""

    def __init__(self, plan: MemoryPlan, starting: Callable[[], Awaitable[None]]) -> None:
        self.plan = plan
        self.state = "starting"
        self.finished = worker_pb2.Finished()
        self.done = Health()
        self.refusal: object = None
        self._starting = starting

    async def start(self) -> None:
        await self._starting()
        self.state = "serving"

    def memory_bytes(self) -> tuple[int, int]:
        return 0, 0

    def health(self) -> Health:
        return self.done

    def limit(self, _limits: object, refusal: object = None) -> None:
        self.refusal = refusal

    def submit(self, *_: object) -> StillEngine:
        if self.refusal is not None:
            raise UnavailableError("the device is too hot")
        return self

    async def __aiter__(self):
        yield worker_pb2.Delta(token_ids=range(4))

    async def aclose(self) -> None:
        pass

    async def drain(self, _deadline_s: float) -> bool:
        return True

    async def close(self) -> None:
        self.state = "stopped"


class StillRack(Rack):
    """`before_load` may hold a start up, or fail it; it is told whose."""

    before_load: Callable[[str], Awaitable[None]] | None = None

    def _new(self, stored):
        async def starting() -> None:
            if self.before_load is not None:
                await self.before_load(stored.digest)

        engine = StillEngine(self.plan_alone(stored.config), starting)
        self.made = [*getattr(self, "made", []), engine]
        return Loaded(stored, engine)
