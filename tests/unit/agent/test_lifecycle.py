"""Which engine is the active one, and which comes back: over engines that stand still."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edgellm_agent.engine.supervisor import Health
from edgellm_agent.errors import BusyError, EngineError, HeldError, PreconditionError, UnavailableError
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.lifecycle.states import TABLE, Event, State, after, under_way
from edgellm_agent.registry import Registry
from tests.support.desired_device import StillManager, install, make_layout, make_manager
from tests.support.publishing import until

WATCHED_S = 60.0


def test_every_state_is_reached_and_every_ending_is_one() -> None:
    reached = set(TABLE.values()) | {State.VERIFYING}
    assert reached == set(State)
    endings = {state for state in State if not under_way(state)}
    assert endings == set(State) - {state for state, _ in TABLE}
    for state in endings:
        for event in Event:
            with pytest.raises(ValueError, match="cannot happen"):
                after(state, event)


def test_the_end_of_the_agent_is_foreseen_in_every_state_that_is_worked_on() -> None:
    for state in State:
        if under_way(state):
            assert (state, Event.AGENT_ENDED) in TABLE
            assert (state, Event.FAILED) in TABLE


class Box:
    """A device's state folder, on which managers follow each other as agents do."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manager: EngineManager = make_manager(root / "state", probation_s=WATCHED_S)
        self.bundles = {
            name: make_layout(root / name, name=name, weights=name.encode() * 500) for name in "abc"
        }
        for bundle, digest in self.bundles.values():
            install(self.manager, bundle, digest)

    def digest(self, name: str) -> str:
        return self.bundles[name][1]

    @property
    def active(self) -> str:
        names = {digest: name for name, (_, digest) in self.bundles.items()}
        return names.get(self.manager.active_digest() or "", "")

    @property
    def states(self) -> dict[str, str]:
        return {name: self.state(name) for name in self.bundles}

    def state(self, name: str) -> str:
        return self.manager.standing(self.manager.find(name)).state

    @property
    def story(self) -> list[str]:
        """The history but the pushes, oldest first."""
        names = {digest: name for name, (_, digest) in self.bundles.items()}
        rows = [row.change for row in reversed(self.manager.history(100))]
        return [f"{change.what} {names[change.engine]}" for change in rows if change.what != "PUSHED"]

    async def commit(self, name: str) -> None:
        """Activates an engine, and has its probation over at once."""
        await self.manager.activate(name)
        found = self.manager.rack.default
        assert found is not None
        self.manager._succession._commit(found)

    async def again(self) -> None:
        """The agent is killed, and started again."""
        await self.manager._succession.close()
        self.manager.registry.close()
        self.manager = make_manager(self.root / "state", probation_s=WATCHED_S)
        self.manager.settle()
        await self.manager.start()

    def fails(self, **done: int) -> None:
        assert self.manager.rack.default is not None
        self.manager.rack.default.engine.done = Health(**done)  # type: ignore[attr-defined]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@asynccontextmanager
async def open_box(box: Box) -> AsyncIterator[Box]:
    try:
        yield box
    finally:
        await box.manager.close()


async def test_an_engine_that_passes_is_committed_and_the_one_before_can_be_gone_back_to(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b")
        assert box.states == {"a": "STORED", "b": "PROBATION", "c": "STORED"}
        with pytest.raises(PreconditionError, match="is needed"):
            box.manager.remove("a")
        await box.commit("b")
        assert box.state("b") == "COMMITTED"
        await box.manager.roll_back()
        assert (box.active, box.state("a")) == ("a", "PROBATION")


@pytest.mark.parametrize(
    ("done", "why"),
    [
        ({"deaths": 2}, "died 2 times"),
        ({"hangs": 1}, "hung"),
        ({"finished": 2, "failed": 3}, "3 of 5 requests"),
    ],
)
async def test_an_engine_that_fails_on_probation_is_rolled_back(
    box: Box, done: dict[str, int], why: str
) -> None:
    async with open_box(box):
        await box.commit("a")
        stored = await box.manager.activate("b")
        waiting = asyncio.ensure_future(box.manager.proven(stored))
        await asyncio.sleep(0)
        box.fails(**done)
        with pytest.raises(EngineError, match=why):
            await asyncio.wait_for(waiting, 20)
        await until(lambda: box.manager.running is not None)
        assert box.active == "a"
        assert box.story[-1] == "ROLLED_BACK b"
        # Nobody goes back to it.
        with pytest.raises(PreconditionError, match="no engine to go back to"):
            await box.manager.roll_back()


@pytest.mark.parametrize("done", [{"deaths": 1}, {"failed": 2}, {"finished": 5, "failed": 4}])
async def test_a_single_mishap_is_no_reason_to_go_back(
    box: Box, done: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b")
        assert box.manager.rack.default is not None
        looks: list[object] = []
        kind = type(box.manager.rack.default.engine)
        monkeypatch.setattr(kind, "health", lambda engine: looks.append(engine) or engine.done)
        box.fails(**done)
        await until(lambda: len(looks) > 2)
        assert (box.active, box.state("b")) == ("b", "PROBATION")


async def test_with_nothing_to_go_back_to_the_engine_stays_and_is_not_proven(box: Box) -> None:
    async with open_box(box):
        stored = await box.manager.activate("a")
        waiting = asyncio.ensure_future(box.manager.proven(stored))
        await asyncio.sleep(0)
        box.fails(hangs=1)
        with pytest.raises(EngineError, match="no engine to go back to"):
            await asyncio.wait_for(waiting, 20)
        assert (box.active, box.state("a"), box.story[-1]) == ("a", "UNPROVEN", "FAILED a")
        # What follows goes back to it all the same, for want of a better one.
        await box.manager.activate("b")
        box.fails(hangs=1)
        await until(lambda: box.active == "a")


async def test_an_engine_on_probation_is_never_what_another_goes_back_to(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b")
        await box.manager.activate("c")
        box.fails(hangs=1)
        await until(lambda: box.active == "a")
        assert box.states == {"a": "COMMITTED", "b": "STORED", "c": "STORED"}


async def test_an_activation_that_fails_leaves_the_probation_of_the_engine_that_stays(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b")

        async def fail(_digest: str) -> None:
            raise EngineError("no weights")

        box.manager.rack.before_load = fail  # type: ignore[attr-defined]
        with pytest.raises(EngineError):
            await box.manager.activate("c")
        assert box.states == {"a": "STORED", "b": "PROBATION", "c": "STORED"}
        box.manager.rack.before_load = None  # type: ignore[attr-defined]
        box.fails(hangs=1)
        await until(lambda: box.active == "a")


async def test_a_probation_goes_on_after_a_restart_but_not_for_ever(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b")
        for _ in range(3):
            await box.again()
            assert (box.active, box.state("b")) == ("b", "PROBATION")
        await box.again()
        assert box.active == "a"
        assert "ended 3 times" in box.manager.history(1)[0].change.error


async def test_an_engine_on_probation_that_does_not_load_after_a_restart_is_gone_back_from(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b")
        bad = box.digest("b")

        async def fail(digest: str) -> None:
            if digest == bad:
                raise EngineError("no weights")

        monkeypatch.setattr(StillManager.rack_type, "before_load", staticmethod(fail))
        await box.again()
        assert box.active == "a"
        assert box.manager.running is not None


@pytest.mark.parametrize("cut", [State.VERIFYING, State.LOADING, State.CANARY])
async def test_an_activation_cut_short_is_told_and_the_old_engine_stays(box: Box, cut: State) -> None:
    async with open_box(box):
        await box.commit("a")
        candidate = box.manager._succession.candidate(box.digest("b"), _nobody())
        box.manager.registry.set_activation(
            type(candidate)(candidate.digest, cut, candidate.fallback, False, 0, "local", 0, "uid 7")
        )
        await box.again()
        assert (box.active, box.story[-1]) == ("a", "INTERRUPTED b")
        assert box.manager.history(1)[0].change.actor == "uid 7"
        assert box.manager.registry.activations() == []


async def test_a_proven_engine_that_dies_in_a_loop_is_gone_back_from(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.commit("b")
        assert box.manager.rack.default is not None
        box.manager._failing(box.manager.rack.default, "5 deaths within 600 s")
        box.manager._failing(box.manager.rack.default, "5 deaths within 600 s")
        await until(lambda: box.active == "a" and box.manager.running is not None)
        assert box.story.count("ROLLED_BACK b") == 1


async def test_a_proven_engine_that_dies_in_a_loop_stays_where_there_is_no_other(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        running = box.manager.rack.default
        assert running is not None
        await box.manager._recovery._give_up(running, "5 deaths within 600 s")
        assert (box.manager.rack.default, box.active) == (running, "a")


async def test_engines_answer_beside_the_default_one_and_come_back_after_a_restart(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b", beside=True)
        assert box.states == {"a": "COMMITTED", "b": "BESIDE", "c": "STORED"}
        assert box.manager.engine_for("") is box.manager.running
        assert box.manager.engine_for("b") is not box.manager.running
        await box.again()
        assert box.manager.engine_for("b") is not box.manager.engine_for("a")
        with pytest.raises(PreconditionError, match="deactivate it first"):
            box.manager.remove("b")
        with pytest.raises(PreconditionError, match="does not answer beside"):
            await box.manager.deactivate("a")
        await box.manager.deactivate("b")
        with pytest.raises(PreconditionError, match="not b"):
            box.manager.engine_for("b")
        assert box.story[-2:] == ["ACTIVATED b", "DEACTIVATED b"]


async def test_an_engine_beside_may_become_the_default_one(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b", beside=True)
        await box.manager.activate("b")
        assert box.states == {"a": "STORED", "b": "PROBATION", "c": "STORED"}
        assert len(box.manager.rack.all) == 1


async def test_one_beside_that_dies_in_a_loop_is_taken_away(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        await box.manager.activate("b", beside=True)
        loaded = box.manager.rack.beside[box.digest("b")]
        await box.manager._recovery._give_up(loaded, "5 deaths within 600 s")
        assert (box.active, box.state("b")) == ("a", "STORED")
        assert box.manager.history(1)[0].change.error == "5 deaths within 600 s"


async def test_while_engines_are_held_none_is_taken_away_unless_forced(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        with box.manager.holds.held("uid 7", "docking"):
            with pytest.raises(HeldError, match=r"uid 7 \(docking\)"):
                await box.manager.activate("b")
            with pytest.raises(HeldError):
                await box.manager.restart()
            # Nothing is taken away.
            await box.manager.activate("c", beside=True)
            with pytest.raises(HeldError):
                await box.manager.deactivate("c")
            assert box.story[-1] == "ACTIVATED c"
            await box.manager.activate("b", force=True)
            assert box.active == "b"
        await box.manager.activate("a")


def test_there_are_only_so_many_holds(box: Box) -> None:
    holds = [box.manager.holds.held("uid 7", "") for _ in range(65)]
    for hold in holds[:64]:
        hold.__enter__()
    with pytest.raises(BusyError, match="64"):
        holds[64].__enter__()
    for hold in holds[:64]:
        hold.__exit__(None, None, None)
    box.manager.holds.check()


async def test_whoever_waits_for_a_probation_is_told_that_the_agent_stops(box: Box) -> None:
    async with open_box(box):
        stored = await box.manager.activate("a")
        waiting = asyncio.ensure_future(box.manager.proven(stored))
        await asyncio.sleep(0)
        box.manager.leave()
        with pytest.raises(UnavailableError, match="the agent stops"):
            await waiting


async def test_a_manifest_that_cannot_be_read_costs_no_other_engine_its_files(box: Box) -> None:
    async with open_box(box):
        await box.commit("a")
        path = box.manager.store.blob_path(box.digest("a"))
        path.chmod(0o600)
        path.write_bytes(b"rotten")
        box.manager.remove("c")
        weights = box.bundles["a"][0].manifest(box.digest("a")).layers
        assert all(box.manager.store.has(layer.digest) for layer in weights)


def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.v1 import fleet_pb2

    monkeypatch.setattr("edgellm_agent.registry._HISTORY_ROWS", 5)
    registry = Registry(tmp_path / "registry.db")
    for number in range(8):
        registry.add_history(fleet_pb2.EngineChanged(what=str(number)))
    assert [row.change.what for row in registry.history(100)] == ["7", "6", "5", "4", "3"]
    registry.close()


def _nobody() -> object:
    from edgellm_agent.origin import LOCAL

    return LOCAL
