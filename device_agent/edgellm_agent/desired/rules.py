"""The rules of desired state, as a pure function: a state and a happening give the next state.

`docs/fleet-device.md` says them in words. What the device has to do follows from the state alone: it works
while `working(state)`, on the engine of that generation. A state is persisted before it is acted upon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from edgellm.bundle.digest import is_digest
from edgellm.v1 import fleet_pb2

Phase: TypeAlias = Literal[
    "NONE",
    "FETCHING",
    "RETRYING",
    "ACTIVATING",
    "PROVING",
    "CONVERGED",
    "FAILED",
    "REFUSED",
    "OVERRIDDEN",
    "PINNED",
]
Ending: TypeAlias = Literal["RETRYING", "FAILED", "REFUSED"]
# What SQLite can hold; a fleet that counts by one never comes here.
MAX_GENERATION = 2**63 - 1
MAX_SOURCE_CHARACTERS = 1024
# So often may a restart cut an activation, or an activation find changed bytes; then the generation fails.
MAX_SETBACKS = 2


@dataclass(frozen=True)
class State:
    """How far the device is with what was desired of it; the defaults are a device that was never asked."""

    generation: int = 0
    """Highest that was seen."""
    engine: str = ""
    """Manifest digest that it asks for."""
    source: str = ""
    phase: Phase = "NONE"
    error: str = ""
    conflict: str = ""
    """Set when the same generation came with two contents."""
    setbacks: int = 0
    overridden: bool = False
    pinned: bool = False
    active: str = ""
    """Manifest digest of the active engine as far as the rules know; empty if there is none."""
    proving: bool = False
    """The active engine is on probation."""
    damaged: bool = False
    """Files of the generation's engine are to be fetched again."""


@dataclass(frozen=True)
class Desired:
    """The fleet asks for an engine."""

    generation: int
    engine: str
    source: str

    @classmethod
    def from_proto(cls, message: fleet_pb2.Desired) -> Desired:
        """Raises ValueError, which names the field, for what no fleet would send."""
        if not 0 < message.generation <= MAX_GENERATION:
            raise ValueError(f"generation: {message.generation} is not between 1 and {MAX_GENERATION}")
        if not is_digest(message.engine):
            raise ValueError(f"engine: not a SHA-256 digest: {message.engine!r:.100}")
        if len(message.source) > MAX_SOURCE_CHARACTERS:
            raise ValueError(f"source: longer than {MAX_SOURCE_CHARACTERS} characters")
        return cls(message.generation, message.engine, message.source)


@dataclass(frozen=True)
class Activated:
    """An engine has become the active one: chosen on the device itself (`local`) or by a generation.

    It is on probation (`proving`) until it is Proven, or RolledBack.
    """

    engine: str
    local: bool
    proving: bool = False


@dataclass(frozen=True)
class Proven:
    """The engine has passed its probation."""

    engine: str


@dataclass(frozen=True)
class RolledBack:
    """An engine that was active has failed; the device has gone back, or has nothing to go back to."""

    engine: str
    active: str
    error: str


@dataclass(frozen=True)
class Damaged:
    """Files of an engine were changed on the disk, and dropped; one that runs goes on running."""

    engine: str


@dataclass(frozen=True)
class Pinned:
    """The device was pinned, or unpinned."""

    pinned: bool


@dataclass(frozen=True)
class Restarted:
    """The agent has started; what the registry says then is true."""

    active: str
    pinned: bool
    proving: bool = False
    fault: str = ""
    """Why the engine of the generation was given up while nobody listened; empty if it was not."""


@dataclass(frozen=True)
class Tried:
    """An attempt for a generation reached a phase: FETCHING as it begins, then ACTIVATING, or how it ended.

    A `setback` is a RETRYING that must not go on for ever.
    """

    generation: int
    phase: Literal["FETCHING", "ACTIVATING", "RETRYING", "FAILED", "REFUSED"]
    error: str = ""
    setback: bool = False


Happening: TypeAlias = Desired | Activated | Proven | RolledBack | Damaged | Pinned | Restarted | Tried


def working(state: State) -> bool:
    """Whether there is something to do for the state's generation."""
    return state.phase in {"FETCHING", "RETRYING", "ACTIVATING"}


def step(state: State, happening: Happening) -> State:
    """The next state; equal to the old one if the happening changes nothing."""
    match happening:
        case Desired():
            then = _desired(state, happening)
        case Activated():
            then = _activated(state, happening)
        case Proven():
            then = _proven(state, happening)
        case RolledBack():
            then = _rolled_back(state, happening)
        case Damaged():
            then = _damaged(state, happening)
        case Pinned():
            then = _pinned(state, happening.pinned)
        case Restarted():
            then = _restarted(state, happening)
        case Tried():
            then = _tried(state, happening)
    return then


def reported(state: State) -> fleet_pb2.Reported:
    """What the fleet is told, without what the rules do not know."""
    return fleet_pb2.Reported(
        observed_generation=state.generation,
        desired_engine=state.engine,
        active_engine=state.active,
        phase=state.phase,
        error="; ".join(text for text in (state.error, state.conflict) if text),
        overridden=state.overridden,
        pinned=state.pinned,
    )


def _desired(state: State, asked: Desired) -> State:
    if asked.generation < state.generation:
        return state
    if asked.generation > state.generation:
        fresh = State(asked.generation, asked.engine, asked.source)
        fresh = replace(fresh, pinned=state.pinned, active=state.active, proving=state.proving)
        return _resumed(fresh)
    if (asked.engine, asked.source) == (state.engine, state.source):
        return state
    conflict = (
        f"generation {asked.generation} also came with {asked.engine} from {asked.source or 'no source'}:"
        " the first counts; set a higher generation"
    )
    return replace(state, conflict=conflict)


def _activated(state: State, now: Activated) -> State:
    state = replace(state, active=now.engine, proving=now.proving)
    if not state.generation:
        return state
    if now.engine == state.engine:
        return _reached(replace(state, error="", overridden=False, damaged=False))
    if now.local:
        return replace(state, phase="OVERRIDDEN", error="", overridden=True)
    return state


def _proven(state: State, now: Proven) -> State:
    if now.engine != state.active:
        return state
    state = replace(state, proving=False)
    return _reached(state) if state.phase == "PROVING" else state


def _rolled_back(state: State, now: RolledBack) -> State:
    state = replace(state, active=now.active, proving=False)
    if not state.generation or (now.engine == state.engine and working(state)):
        return state
    if now.engine == state.engine:
        return replace(state, phase="FAILED", error=now.error, overridden=False)
    # What had replaced the fleet's engine is gone: that one is back.
    return _reached(replace(state, error="", overridden=False)) if now.active == state.engine else state


def _damaged(state: State, found: Damaged) -> State:
    if found.engine != state.engine or not state.source:
        return state
    state = replace(state, damaged=True)
    return _resumed(state) if state.phase in {"PROVING", "CONVERGED"} else state


def _reached(state: State) -> State:
    """The engine of the generation answers."""
    return replace(state, phase="PROVING" if state.proving else "CONVERGED")


def _pinned(state: State, pinned: bool) -> State:
    before, state = state.pinned, replace(state, pinned=pinned)
    if pinned:
        return _resumed(state) if working(state) else state
    # To unpin is to give the device back to its fleet, an override included.
    given_back = state.phase in {"PINNED", "OVERRIDDEN"} or (state.damaged and state.phase != "FAILED")
    return _resumed(state) if before and given_back else state


def _restarted(state: State, found: Restarted) -> State:
    known, was_pinned = state.active, state.pinned
    state = replace(state, active=found.active, pinned=found.pinned, proving=found.proving)
    if found.fault:
        # Given up, and the agent ended before the rules heard of it.
        return _rolled_back(state, RolledBack(state.engine, found.active, found.fault))
    if found.active != known:
        # Activated, and the same.
        return _activated(state, Activated(found.active, local=True, proving=found.proving))
    if state.phase in {"PROVING", "CONVERGED"}:
        return _resumed(state)
    if was_pinned and not found.pinned:
        return _pinned(replace(state, pinned=True), pinned=False)
    if state.phase == "ACTIVATING":
        state = _setback(state, "the agent ended while it activated the engine")
        return state if state.phase == "FAILED" else _resumed(state)
    # What refused it (the allow-list, the runtime, memory) may have changed; a failure is not tried again.
    return _resumed(state) if state.phase in {"FETCHING", "RETRYING", "REFUSED"} else state


def _tried(state: State, tried: Tried) -> State:
    if tried.generation != state.generation or not working(state):
        return state
    if tried.setback:
        return _setback(state, tried.error)
    return replace(state, phase=tried.phase, error=tried.error)


def _setback(state: State, error: str) -> State:
    setbacks = state.setbacks + 1
    if setbacks > MAX_SETBACKS:
        return replace(state, phase="FAILED", setbacks=setbacks, error=f"{error}, {setbacks} times")
    return replace(state, phase="RETRYING", setbacks=setbacks, error=error)


def _resumed(state: State) -> State:
    """The state's generation is to be reached, if the device is not there and not pinned."""
    state = replace(state, error="", overridden=False)
    if state.engine == state.active and not (state.damaged and not state.pinned):
        return _reached(state)
    # A damaged engine is fetched again while it runs: to activate what answers changes nothing.
    return replace(state, phase="PINNED" if state.pinned else "FETCHING")
