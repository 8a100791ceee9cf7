"""The engines in memory: the default one, and those that answer beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from edgellm.bundle.config import EngineConfig
from edgellm.errors import DoesNotFitError
from edgellm.memory import MemoryPlan
from edgellm_agent.engine.figures import Totals
from edgellm_agent.engine.pressure import read_pressure
from edgellm_agent.engine.supervisor import EngineSpec, Limits, Refusal, Serving, SupervisedEngine
from edgellm_agent.errors import TooLargeError
from edgellm_agent.events import Events
from edgellm_agent.lifecycle.library import StoredEngine
from edgellm_agent.memory import MemoryPolicy
from edgellm_agent.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """How engines are run here."""

    memory: MemoryPolicy
    runtimes: Mapping[str, str]
    """Runtime name → version."""
    architecture: str
    serving: Serving = field(default_factory=Serving)
    drain_s: float = 30.0


@dataclass(eq=False)
class Loaded:
    """An engine in memory."""

    stored: StoredEngine
    engine: SupervisedEngine


class Rack:
    """Loads engines by the memory plan, and lets go of them once their requests have ended.

    Args:
        store: Has their files.
        policy: How they are run.
        totals: What all of them are counted in.
        events: Hears when a worker has ended.
        on_change: Called when another engine runs, or one is in another state.
        on_looping: Called with an engine whose workers die again and again, and how.
    """

    def __init__(
        self,
        store: Store,
        policy: Policy,
        totals: Totals,
        events: Events,
        *,
        on_change: Callable[[], None],
        on_looping: Callable[[Loaded, str], None],
    ) -> None:
        self.default: Loaded | None = None
        self.beside: dict[str, Loaded] = {}
        self._store = store
        self._policy = policy
        self._totals = totals
        self._events = events
        self._on_change = on_change
        self._on_looping = on_looping
        self._limits = Limits()
        self._refusal: Refusal | None = None

    @property
    def all(self) -> list[Loaded]:
        """The default engine first."""
        return [*([] if self.default is None else [self.default]), *self.beside.values()]

    def serving(self, digest: str) -> Loaded | None:
        """The engine, if it is in memory and answers."""
        return next((e for e in self.all if e.stored.digest == digest and e.engine.state == "serving"), None)

    async def load(
        self, stored: StoredEngine, *, beside: bool = False, on_draining: Callable[[], None] = lambda: None
    ) -> Loaded:
        """Loads an engine next to those that run if memory allows, else for the default one.

        That one then has been stopped; `restore` brings it back. Raises AgentError or DoesNotFitError.
        """
        loaded = self._new(stored)
        try:
            await loaded.engine.start()
        except (DoesNotFitError, TooLargeError):
            if beside or self.default is None or self.default.engine.state == "stopped":
                raise
            log.info("engine.not_both_fit old=%s new=%s", self.default.stored.digest, stored.digest)
            on_draining()
            await self.retire(self.default)
            loaded = self._new(stored)
            await loaded.engine.start()
        # What the governor allows holds from `put` on: its first request is not answered for anybody.
        return loaded

    def put(self, loaded: Loaded) -> list[Loaded]:
        """Makes a loaded engine the default one; gives those that it replaces, which are to be retired."""
        replaced = [self.default, self.beside.pop(loaded.stored.digest, None)]
        self.default = loaded
        self._apply()
        self._on_change()
        return [old for old in replaced if old is not None and old is not loaded]

    def put_beside(self, loaded: Loaded) -> None:
        """Has a loaded engine answer beside the default one."""
        self.beside[loaded.stored.digest] = loaded
        self._apply()
        self._on_change()

    async def take(self, loaded: Loaded, *, at_once: bool = False) -> None:
        """Lets go of an engine, once its requests have ended or, if it does not work anyway, `at_once`."""
        if self.default is loaded:
            self.default = None
        self.beside.pop(loaded.stored.digest, None)
        self._apply()
        self._on_change()
        await self.retire(loaded, at_once=at_once)

    async def restore(self) -> None:
        """Brings the default engine back if it was stopped for one that failed; raises as `load`."""
        if self.default is None or self.default.engine.state != "stopped":
            return
        stored, self.default = self.default.stored, None
        self.put(await self.load(stored))

    async def retire(self, loaded: Loaded, *, at_once: bool = False) -> None:
        """Ends an engine; one that does not answer gets no time for its requests."""
        engine = loaded.engine
        if engine.state != "stopped":
            await engine.drain(self._policy.drain_s if engine.state == "serving" and not at_once else 0)
            await engine.close()

    async def close(self) -> None:
        """Ends all of them."""
        for loaded in self.all:
            await self.retire(loaded)

    def limit(self, limits: Limits, refusal: Refusal | None = None) -> None:
        """What the governor allows all of them together, from now on."""
        self._limits, self._refusal = limits, refusal
        self._apply()

    def available_bytes(self) -> int:
        """Memory that one more engine could have now."""
        return self._policy.memory.available_bytes(*self._taken())

    def plan_alone(self, config: EngineConfig) -> MemoryPlan:
        """How an engine would fit in place of all that run; raises DoesNotFitError."""
        resident, _ = self._taken()
        memory = self._policy.memory
        return memory.plan(config, memory.available_in_place_of(resident))

    def _taken(self, but: SupervisedEngine | None = None) -> tuple[int, int]:
        """Bytes that engines hold, and that they were granted and have not taken yet."""
        each = [
            e.engine.memory_bytes() for e in self.all if e.engine is not but and e.engine.state != "stopped"
        ]
        return sum(resident for resident, _ in each), sum(promised for _, promised in each)

    def _new(self, stored: StoredEngine) -> Loaded:
        policy = self._policy
        spec = EngineSpec(
            digest=stored.digest,
            directory=self._store.link(stored.manifest),
            config=stored.config,
            serving=policy.serving,
            read_pressure=lambda: read_pressure(policy.memory.root),
        )
        engine = SupervisedEngine(
            spec,
            # Asked again for each worker: what the others hold changes.
            lambda: policy.memory.plan(stored.config, policy.memory.available_bytes(*self._taken(engine))),
            self._on_change,
            totals=self._totals,
            on_worker_ended=self._events.tell,
            on_looping=lambda reason: self._on_looping(loaded, reason),
        )
        loaded = Loaded(stored, engine)
        return loaded

    def _apply(self) -> None:
        share = self._share(len(self.all))
        for loaded in self.all:
            loaded.engine.limit(share, self._refusal)

    def _share(self, count: int) -> Limits:
        """An engine's part of the requests that may run at once; all keep the same pace."""
        most = self._limits.max_sequences
        return replace(self._limits, max_sequences=None if most is None else max(1, most // max(1, count)))
