"""The rules of desired state: each by an example, then all of them over any sequence of happenings."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgellm.v1 import fleet_pb2
from edgellm_agent.desired import rules
from edgellm_agent.desired.rules import (
    Activated,
    Damaged,
    Desired,
    Pinned,
    Proven,
    Restarted,
    RolledBack,
    State,
    Tried,
    step,
)

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
SOURCE = "https://engines.example/fleet"


def after(*happenings, state=None):
    state = state or State(active=A)
    for happening in happenings:
        state = step(state, happening)
    return state


def test_a_device_that_was_never_asked_has_nothing_to_do():
    state = after(Restarted(A, pinned=False), Activated(B, local=True))
    assert (state.phase, state.overridden, rules.working(state)) == ("NONE", False, False)


def test_a_higher_generation_is_worked_for():
    state = after(Desired(3, B, SOURCE))
    assert (state.phase, state.generation, state.engine) == ("FETCHING", 3, B)


@pytest.mark.parametrize("generation", [1, 2])
def test_a_lower_generation_is_ignored(generation):
    state = after(Desired(3, B, SOURCE))
    assert step(state, Desired(generation, C, SOURCE)) == state


def test_the_same_message_again_changes_nothing():
    state = after(Desired(3, B, SOURCE), Tried(3, "FAILED", "no"))
    assert step(state, Desired(3, B, SOURCE)) == state


def test_an_equal_generation_with_another_engine_is_told_and_the_first_counts():
    state = after(Desired(3, B, SOURCE), Desired(3, C, SOURCE))
    assert (state.engine, state.phase) == (B, "FETCHING")
    assert C in rules.reported(state).error
    assert "higher generation" in rules.reported(state).error
    assert rules.reported(step(state, Desired(4, C, SOURCE))).error == ""


def test_the_active_engine_is_converged_to_at_once():
    assert after(Desired(1, A, "")).phase == "CONVERGED"
    assert after(Pinned(True), Desired(1, A, "")).phase == "CONVERGED"


def test_a_local_activation_overrides_and_stops_a_fetch():
    state = after(Desired(1, B, SOURCE), Activated(C, local=True))
    assert (state.phase, state.overridden, state.active) == ("OVERRIDDEN", True, C)
    assert step(state, Tried(1, "FETCHING")) == state


def test_a_higher_generation_replaces_an_override():
    state = after(Desired(1, B, SOURCE), Activated(C, local=True), Desired(2, B, SOURCE))
    assert (state.phase, state.overridden) == ("FETCHING", False)


def test_activating_the_desired_engine_by_hand_is_no_override():
    state = after(Desired(1, B, SOURCE), Activated(B, local=True))
    assert (state.phase, state.overridden) == ("CONVERGED", False)


@pytest.mark.parametrize("phase", ["FETCHING", "ACTIVATING", "RETRYING"])
def test_a_pin_stops_the_work_and_unpinning_takes_it_up(phase):
    state = after(Desired(1, B, SOURCE), Tried(1, phase, "e"), Pinned(True))
    assert (state.phase, state.pinned, state.error) == ("PINNED", True, "")
    assert after(Pinned(False), state=state).phase == "FETCHING"


def test_a_generation_that_comes_to_a_pinned_device_waits():
    state = after(Desired(1, A, ""), Pinned(True), Desired(2, B, SOURCE), Desired(3, C, SOURCE))
    assert (state.phase, state.generation) == ("PINNED", 3)
    assert after(Pinned(False), state=state).engine == C


def test_unpinning_ends_an_override_and_unpinning_again_does_not():
    overridden = after(Desired(1, B, SOURCE), Pinned(True), Activated(C, local=True))
    assert overridden.phase == "OVERRIDDEN"
    assert after(Pinned(False), state=overridden).phase == "FETCHING"
    again = after(Pinned(False), Activated(C, local=True), Pinned(False), state=overridden)
    assert again.phase == "OVERRIDDEN"


def test_a_failed_generation_stays_failed_over_restarts_and_pins():
    state = after(Desired(1, B, SOURCE), Tried(1, "FAILED", "bad"))
    state = after(Restarted(A, pinned=False), Pinned(True), Pinned(False), Restarted(A, False), state=state)
    assert (state.phase, state.error) == ("FAILED", "bad")
    assert step(state, Desired(2, B, SOURCE)).phase == "FETCHING"


def test_what_was_refused_is_judged_again_after_a_restart():
    state = after(Desired(1, B, SOURCE), Tried(1, "REFUSED", "not allowed"), Restarted(A, pinned=False))
    assert state.phase == "FETCHING"


def test_the_end_of_an_attempt_for_an_older_generation_is_ignored():
    state = after(Desired(1, B, SOURCE), Desired(2, C, SOURCE))
    assert step(state, Tried(1, "FAILED", "late")) == state
    assert after(Activated(B, local=False), state=state).phase == "FETCHING"
    assert after(Activated(C, local=False), state=state).phase == "CONVERGED"


def test_an_activation_that_restarts_cut_is_given_up():
    state = after(Desired(1, B, SOURCE))
    for _ in range(rules.MAX_SETBACKS):
        state = after(Tried(1, "ACTIVATING"), Restarted(A, pinned=False), state=state)
        assert state.phase == "FETCHING"
    state = after(Tried(1, "ACTIVATING"), Restarted(A, pinned=False), state=state)
    assert state.phase == "FAILED"
    assert "3 times" in state.error


def test_bytes_that_change_again_and_again_fail_the_generation():
    state = after(Desired(1, B, SOURCE))
    for _ in range(rules.MAX_SETBACKS):
        state = step(state, Tried(1, "RETRYING", "changed", setback=True))
        assert state.phase == "RETRYING"
    assert step(state, Tried(1, "RETRYING", "changed", setback=True)).phase == "FAILED"


def test_an_activation_that_was_committed_just_before_the_agent_ended_counts():
    cut = after(Desired(1, B, SOURCE), Tried(1, "ACTIVATING"))
    assert after(Restarted(B, pinned=False), state=cut).phase == "CONVERGED"
    assert after(Restarted(C, pinned=False), state=cut).phase == "OVERRIDDEN"


def test_a_pin_and_an_unpin_just_before_the_agent_ended_count():
    working = after(Desired(1, B, SOURCE))
    assert after(Restarted(A, pinned=True), state=working).phase == "PINNED"
    pinned = after(Pinned(True), state=working)
    assert after(Restarted(A, pinned=False), state=pinned).phase == "FETCHING"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"generation": 0}, "generation"),
        ({"generation": 2**63}, "generation"),
        ({"engine": ""}, "engine"),
        ({"engine": "sha256:" + "A" * 64}, "engine"),
        ({"engine": "../../etc/passwd"}, "engine"),
        ({"source": "x" * 2000}, "source"),
    ],
)
def test_what_no_fleet_would_send_is_named(changes, field):
    message = fleet_pb2.Desired(**{"generation": 1, "engine": B, "source": SOURCE, **changes})
    with pytest.raises(ValueError, match=field):
        Desired.from_proto(message)


def test_an_engine_that_proves_itself_is_converged_to_and_one_that_fails_is_not_tried_again():
    proving = after(Desired(3, B, SOURCE), Activated(B, local=False, proving=True))
    assert (proving.phase, rules.working(proving)) == ("PROVING", False)
    assert after(Proven(B), state=proving).phase == "CONVERGED"
    failed = after(RolledBack(B, A, "its worker hung"), state=proving)
    assert (failed.phase, failed.active, failed.error) == ("FAILED", A, "its worker hung")
    assert after(Restarted(A, pinned=False), state=failed) == failed


def test_an_engine_damaged_on_disk_is_fetched_again_if_the_fleet_said_from_where():
    converged = after(Desired(3, B, SOURCE), Activated(B, local=False))
    assert after(Damaged(B), state=converged).phase == "FETCHING"
    assert after(Damaged(C), state=converged) == converged
    local = after(Desired(3, B, ""), Activated(B, local=False))
    assert after(Damaged(B), state=local) == local


def test_an_override_that_fails_gives_the_device_back():
    overridden = after(Desired(3, B, SOURCE), Activated(B, local=False), Activated(C, local=True))
    back = after(RolledBack(C, B, "its worker hung"), state=overridden)
    assert (back.phase, back.overridden, back.active) == ("CONVERGED", False, B)


def test_an_engine_given_up_while_nobody_listened_is_failed_not_overridden():
    proving = after(Desired(3, B, SOURCE), Activated(B, local=False, proving=True))
    state = after(Restarted(A, pinned=False, fault="its worker hung"), state=proving)
    assert (state.phase, state.overridden) == ("FAILED", False)


ENGINES = st.sampled_from([A, B, C])


class Device(RuleBasedStateMachine):
    """A device that obeys the rules; `active` and `pinned` are as its registry has them."""

    def __init__(self):
        super().__init__()
        self.state = State()
        self.active, self.pinned, self.proving, self.given_up = "", False, False, ""
        self.asked = {}

    @initialize(active=ENGINES)
    def begins(self, active):
        self.active = active
        self.happens(Restarted(active, pinned=False))

    def happens(self, happening):
        highest = self.state.generation
        self.state = step(self.state, happening)
        assert self.state.generation >= highest

    @rule(generation=st.integers(1, 6), engine=ENGINES)
    def the_fleet_asks(self, generation, engine):
        if generation > max(self.asked, default=0):
            self.asked[generation] = engine
        self.happens(Desired(generation, engine, SOURCE))

    @rule(engine=ENGINES, proving=st.booleans())
    def somebody_activates(self, engine, proving):
        self.active, self.proving, self.given_up = engine, proving, ""
        self.happens(Activated(engine, local=True, proving=proving))

    @precondition(lambda self: self.proving)
    @rule()
    def the_engine_proves_itself(self):
        self.proving = False
        self.happens(Proven(self.active))

    @precondition(lambda self: self.active)
    @rule(back_to=ENGINES, told=st.booleans())
    def the_engine_fails(self, back_to, told):
        reached = self.state.phase in {"PROVING", "CONVERGED"}
        self.given_up, self.active, self.proving = self.active, back_to, False
        if told or back_to == self.given_up:
            self.happens(RolledBack(self.given_up, back_to, "it died"))
        else:
            fault = "it died" if reached else ""
            self.happens(Restarted(back_to, self.pinned, proving=False, fault=fault))

    @rule(pinned=st.booleans())
    def somebody_pins(self, pinned):
        if pinned != self.pinned:
            self.pinned = pinned
            self.happens(Pinned(pinned))

    @precondition(lambda self: rules.working(self.state))
    @rule(phase=st.sampled_from(["FETCHING", "RETRYING", "REFUSED", "FAILED"]), setback=st.booleans())
    def an_attempt_ends(self, phase, setback):
        error = "" if phase == "FETCHING" else "e"
        self.happens(Tried(self.state.generation, phase, error, setback=setback and phase == "RETRYING"))

    @precondition(lambda self: rules.working(self.state))
    @rule(told=st.booleans())
    def the_desired_engine_is_activated(self, told):
        self.happens(Tried(self.state.generation, "ACTIVATING"))
        self.commits(self.state.engine)
        if told:
            self.happens(Activated(self.active, local=False, proving=self.proving))
        else:
            self.restarts()

    def commits(self, engine):
        assert not self.pinned, "a pinned device is never changed by its fleet"
        self.active, self.proving, self.given_up = engine, True, ""

    @rule()
    def restarts(self):
        self.happens(Restarted(self.active, self.pinned, self.proving))

    @invariant()
    def it_knows_what_the_registry_knows(self):
        known = (self.state.active, self.state.pinned, self.state.proving)
        assert known == (self.active, self.pinned, self.proving)

    @invariant()
    def the_highest_generation_counts_and_the_first_of_equals(self):
        highest = max(self.asked, default=0)
        assert self.state.generation == highest
        assert self.state.engine == self.asked.get(highest, "")

    @invariant()
    def the_phase_says_what_is(self):
        state = self.state
        assert (state.phase == "NONE") == (state.generation == 0)
        assert not (rules.working(state) and state.pinned)
        if state.generation:
            reached = state.phase in {"PROVING", "CONVERGED"}
            # An engine that has failed may still be the active one: there was none to go back to.
            failed = state.phase == "FAILED" and self.given_up == state.engine
            assert (state.active == state.engine) == (reached or (failed and state.active == state.engine))
            assert not reached or (state.phase == "PROVING") == state.proving
        assert state.overridden == (state.phase == "OVERRIDDEN")
        assert state.phase != "PINNED" or state.pinned
        assert bool(state.error) == (state.phase in {"RETRYING", "FAILED", "REFUSED"})

    @invariant()
    def left_alone_with_a_source_it_converges(self):
        state = self.state
        if rules.working(state):
            done = after(Tried(state.generation, "ACTIVATING"), Activated(state.engine, False), state=state)
            assert done == replace(state, phase="CONVERGED", active=state.engine, error="", proving=False)


Device.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnySequence = Device.TestCase
