"""What a device does when engines fail to come, to come back, or to be written down."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from edgellm_agent.engine.figures import Health
from edgellm_agent.engine.supervisor import Limits, Refusal
from edgellm_agent.errors import (
    BusyError,
    EngineError,
    HeldError,
    NotFoundError,
    PreconditionError,
    TooLargeError,
)
from edgellm_agent.lifecycle import recovery, succession
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.lifecycle.states import State
from edgellm_agent.registry import Activation
from tests.support.desired_device import install, make_layout, make_manager
from tests.support.publishing import until

FULL = sqlite3.OperationalError("database or disk is full")


class Shelf:
    """A device with three engines on its disk; loads fail as `failures` says, first come first served."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundles = {
            name: make_layout(root / name, name=name, weights=name.encode() * 500) for name in "abc"
        }
        self.failures: list[Exception | None] = []
        self.loaded: list[str] = []
        self.manager = self._manager()
        for bundle, digest in self.bundles.values():
            install(self.manager, bundle, digest)

    def _manager(self) -> EngineManager:
        manager = make_manager(self.root / "state", probation_s=60)
        manager.rack.before_load = self._load  # type: ignore[attr-defined]
        return manager

    async def _load(self, digest: str) -> None:
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self.loaded.append(self.name(digest))

    def digest(self, name: str) -> str:
        return self.bundles[name][1]

    def name(self, digest: str | None) -> str:
        return next((name for name, (_, known) in self.bundles.items() if known == digest), "")

    @property
    def active(self) -> str:
        return self.name(self.manager.active_digest())

    @property
    def proven(self) -> str:
        return "".join(self.name(digest) for digest in self.manager.registry.proven())

    @property
    def runs(self) -> bool:
        running = self.manager.running
        return running is not None and running.state == "serving"

    def state(self, name: str) -> str:
        return self.manager.standing(self.manager.find(name)).state

    async def commit(self, name: str) -> None:
        await self.manager.activate(name)
        assert self.manager.rack.default is not None
        self.manager._succession._commit(self.manager.rack.default)

    async def reopen(self) -> None:
        """The agent was killed; another one is about to start."""
        await self.manager._succession.close()
        self.manager.registry.close()
        self.manager = self._manager()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (recovery, "_FIRST_PAUSE_S"),
        (recovery, "_LONGEST_PAUSE_S"),
        (succession, "_RETRY_S"),
    ):
        monkeypatch.setattr(module, name, 0.01)


@pytest.fixture
async def shelf(tmp_path: Path) -> AsyncIterator[Shelf]:
    made = Shelf(tmp_path)
    yield made
    made.manager.leave()
    await made.manager.close()


def failing_writes(times: int, write: Callable[..., object]) -> Callable[..., object]:
    """The write, after it has failed so often as a full disk has it fail."""
    left = [FULL] * times

    def attempt(*arguments: object) -> object:
        if left:
            raise left.pop()
        return write(*arguments)

    return attempt


async def test_an_old_engine_that_does_not_come_back_at_once_comes_back_later(shelf: Shelf) -> None:
    await shelf.commit("a")
    full = TooLargeError("no memory", 1, 0)
    shelf.failures = [full, EngineError("bad weights"), full, full]
    with pytest.raises(EngineError, match="bad weights"):
        await shelf.manager.activate("b")
    await until(lambda: shelf.runs)
    assert (shelf.active, shelf.state("a")) == ("a", "COMMITTED")


async def test_a_disk_that_fills_up_in_an_activation_costs_no_engine(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shelf.commit("a")
    registry = shelf.manager.registry
    shelf.failures = [TooLargeError("not both", 1, 0)]
    with monkeypatch.context() as full:
        full.setattr(registry, "set_active", failing_writes(1, registry.set_active))
        write = registry.set_activation

        def refuse_endings(now: Activation) -> None:
            if now.state is State.FAILED:
                raise FULL
            write(now)

        full.setattr(registry, "set_activation", refuse_endings)
        with pytest.raises(sqlite3.OperationalError):
            await shelf.manager.activate("b")
    await until(lambda: shelf.runs)
    assert shelf.active == "a"
    serving = [engine for engine in shelf.manager.rack.made if engine.state == "serving"]  # type: ignore[attr-defined]
    assert serving == [shelf.manager.running]
    await shelf.manager.activate("b")
    assert shelf.active == "b"


async def test_the_probation_goes_on_where_the_step_past_it_could_not_be_written(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shelf.commit("a")
    stored = await shelf.manager.activate("b")
    waiting = asyncio.ensure_future(shelf.manager.proven(stored))
    registry = shelf.manager.registry
    monkeypatch.setattr(registry, "set_active", failing_writes(1, registry.set_active))
    with pytest.raises(sqlite3.OperationalError):
        await shelf.manager.activate("c")
    assert (shelf.state("b"), waiting.done()) == ("PROBATION", False)
    waiting.cancel()


async def test_neither_heat_nor_want_of_memory_at_the_start_speaks_against_an_engine(shelf: Shelf) -> None:
    for name in "abc":
        await shelf.commit(name)
    await shelf.reopen()
    shelf.manager.rack.limit(Limits(), Refusal("the device is too hot", 5))
    shelf.failures = [TooLargeError("no memory", 1, 0)] * 10
    await shelf.manager.start()
    assert shelf.runs
    assert (shelf.active, shelf.proven) == ("c", "cba")


async def test_a_proven_engine_that_never_loads_gives_way_after_three_tries(shelf: Shelf) -> None:
    for name in "ab":
        await shelf.commit(name)
    await shelf.reopen()
    shelf.failures = [EngineError("bad weights")] * 3
    await shelf.manager.start()
    assert (shelf.active, shelf.proven) == ("a", "a")


async def test_a_disk_that_is_full_at_the_start_keeps_no_engine_from_coming(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shelf.commit("a")
    await shelf.manager.activate("b")
    await shelf.reopen()
    registry = shelf.manager.registry
    monkeypatch.setattr(registry, "set_activation", failing_writes(1, registry.set_activation))
    shelf.manager.settle()
    await shelf.manager.start()
    assert shelf.runs
    assert (shelf.active, shelf.state("b")) == ("b", "PROBATION")


async def test_an_engine_restarted_on_probation_is_watched_as_before(shelf: Shelf) -> None:
    await shelf.commit("a")
    stored = await shelf.manager.activate("b")
    waiting = asyncio.ensure_future(shelf.manager.proven(stored))
    await shelf.manager.restart()
    assert shelf.manager.rack.default is not None
    shelf.manager.rack.default.engine.done = Health(hangs=1)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="hung"):
        await asyncio.wait_for(waiting, 20)
    await until(lambda: shelf.runs)
    assert shelf.active == "a"


async def test_a_restart_that_fails_is_told_and_tried_again(shelf: Shelf) -> None:
    await shelf.commit("a")
    shelf.failures = [TooLargeError("no memory", 1, 0)]
    with pytest.raises(EngineError, match="does not come back yet"):
        await shelf.manager.restart()
    await until(lambda: shelf.runs)


async def test_an_engine_whose_worker_is_starting_again_keeps_its_probation(shelf: Shelf) -> None:
    await shelf.commit("a")
    await shelf.manager.activate("b")
    assert shelf.manager.running is not None
    shelf.manager.running.state = "restarting"
    with pytest.raises(BusyError, match="starting again"):
        await shelf.manager.activate("b")
    with pytest.raises(PreconditionError, match="is the default engine"):
        await shelf.manager.activate("b", beside=True)
    assert shelf.state("b") == "PROBATION"


async def test_an_active_engine_that_is_not_in_memory_can_be_asked_for(shelf: Shelf) -> None:
    await shelf.commit("a")
    await shelf.manager.activate("b")
    await shelf.reopen()
    shelf.manager.settle()
    await shelf.manager.activate("b")
    assert (shelf.runs, shelf.active, shelf.state("b")) == (True, "b", "PROBATION")


async def test_what_cannot_be_written_for_now_is_written_later(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shelf.commit("a")
    stored = await shelf.manager.activate("b")
    registry, loop = shelf.manager.registry, asyncio.get_running_loop()
    monkeypatch.setattr(registry, "set_proven", failing_writes(3, registry.set_proven))
    probation = shelf.manager._succession._probation
    assert probation is not None
    assert shelf.manager.rack.default is not None
    probation.ends_at = loop.time()
    shelf.manager._succession.begin_probation(shelf.manager.rack.default)
    await asyncio.wait_for(shelf.manager.proven(stored), 20)
    assert shelf.state("b") == "COMMITTED"


async def test_a_rollback_that_cannot_be_written_for_now_is_done_later(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shelf.commit("a")
    await shelf.manager.activate("b")
    registry = shelf.manager.registry
    monkeypatch.setattr(registry, "set_unproven", failing_writes(3, registry.set_unproven))
    assert shelf.manager.rack.default is not None
    shelf.manager.rack.default.engine.done = Health(hangs=1)  # type: ignore[attr-defined]
    await until(lambda: shelf.active == "a" and shelf.runs)


async def test_what_one_goes_back_to_is_not_loaded_twice(shelf: Shelf) -> None:
    await shelf.commit("a")
    await shelf.commit("b")
    await shelf.manager.activate("a", beside=True)
    loads = len(shelf.loaded)
    assert shelf.manager.rack.default is not None
    shelf.manager._failing(shelf.manager.rack.default, "5 deaths within 600 s")
    await until(lambda: shelf.active == "a" and shelf.runs)
    assert len(shelf.loaded) == loads
    assert len(shelf.manager.rack.all) == 1


async def test_engines_beside_make_room_for_the_default_one(shelf: Shelf) -> None:
    await shelf.commit("a")
    await shelf.manager.activate("c", beside=True)
    full = TooLargeError("no memory", 1, 0)
    shelf.failures = [full, full]
    await shelf.manager.activate("b")
    assert (shelf.active, shelf.state("c")) == ("b", "STORED")
    assert any("memory is needed" in row.change.error for row in shelf.manager.history(5))


async def test_a_hold_that_begins_in_an_activation_counts(shelf: Shelf) -> None:
    await shelf.commit("a")
    loading, go_on = asyncio.Event(), asyncio.Event()

    async def hold_up(_digest: str) -> None:
        loading.set()
        await go_on.wait()

    shelf.manager.rack.before_load = hold_up  # type: ignore[attr-defined]
    activation = asyncio.ensure_future(shelf.manager.activate("b"))
    await loading.wait()
    with shelf.manager.holds.held("uid 7", "docking"):
        go_on.set()
        with pytest.raises(HeldError, match="docking"):
            await activation
    assert (shelf.active, shelf.runs) == ("a", True)
    assert shelf.manager.registry.activations() == []


async def test_a_held_engine_is_not_stopped_to_make_room(shelf: Shelf) -> None:
    await shelf.commit("a")
    running = shelf.manager.running
    hold = shelf.manager.holds.held("uid 7", "docking")

    async def held_meanwhile(_digest: str) -> None:
        hold.__enter__()
        raise TooLargeError("not both", 1, 0)

    shelf.manager.rack.before_load = held_meanwhile  # type: ignore[attr-defined]
    with pytest.raises(HeldError):
        await shelf.manager.activate("b")
    hold.__exit__(None, None, None)
    assert shelf.manager.running is running
    assert shelf.runs


async def test_an_engine_whose_manifest_rots_is_told_of_once_and_can_be_removed(shelf: Shelf) -> None:
    await shelf.commit("a")
    path = shelf.manager.store.blob_path(shelf.digest("b"))
    path.chmod(0o600)
    path.write_bytes(b"rotten")
    for _ in range(3):
        assert len(shelf.manager.engines()) == 2
    told = [row.change for row in shelf.manager.history(100) if row.change.what == "DAMAGED"]
    assert [change.engine for change in told] == [shelf.digest("b")]
    shelf.manager.remove(shelf.digest("b"))
    weights = shelf.bundles["b"][0].manifest(shelf.digest("b")).layers
    assert not any(shelf.manager.store.has(layer.digest) for layer in weights if layer.title.startswith("w"))


async def test_files_that_are_missing_are_told_of_once_until_they_are_here_again(shelf: Shelf) -> None:
    bundle, digest = shelf.bundles["b"]
    weights = max(bundle.manifest(digest).layers, key=lambda layer: layer.size_bytes)
    stored = shelf.manager.find("b")

    async def look() -> int:
        with pytest.raises(NotFoundError):
            await shelf.manager.library.verify(stored)
        return sum(row.change.what == "DAMAGED" for row in shelf.manager.history(100))

    shelf.manager.store.drop(weights.digest)
    assert [await look(), await look()] == [1, 1]
    install(shelf.manager, bundle, digest)
    shelf.manager.store.drop(weights.digest)
    assert await look() == 2


async def test_what_has_come_of_a_push_that_was_given_up_can_be_removed(shelf: Shelf, tmp_path: Path) -> None:
    bundle, digest = make_layout(tmp_path / "d", name="d", weights=b"d" * 100_000)
    manifest = bundle.manifest(digest)
    shelf.manager.prepare(manifest, bundle.config(manifest))
    shelf.manager.begin_push(manifest, bundle.config(manifest))
    assert any((tmp_path / "state" / "ingest").iterdir())
    shelf.manager.remove(digest)
    assert not any((tmp_path / "state" / "ingest").iterdir())
