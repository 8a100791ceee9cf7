"""The states of an activation, as a table: (state, event) gives the next state.

The state is in the registry before anything is done in it, and the pointer to the active engine moves in the
same transaction as the state. So whenever the power is cut, the next start finds the old engine, or the new
one, and knows which step was cut.

      VERIFYING ─▶ LOADING ─▶ CANARY ─▶ PROBATION ─▶ COMMITTED
          │           │          │          ├─▶ ROLLED_BACK   there is an engine to go back to
          └───────────┴──────────┤          ├─▶ UNPROVEN      there is none: it stays, as it is
                 FAILED, or      │          └─▶ SUPERSEDED    another one was activated meanwhile
              INTERRUPTED by     └─▶ BESIDE   it answers beside the active engine, if that was asked for
            the end of the agent
"""

from __future__ import annotations

import enum


class State(str, enum.Enum):
    """Where an activation is. Those up to PROBATION are worked on; the others are endings."""

    VERIFYING = "VERIFYING"
    """Every byte is read, and whoever stands for the engine is asked for."""
    LOADING = "LOADING"
    CANARY = "CANARY"
    """It answers a first request, which nobody else sees."""
    PROBATION = "PROBATION"
    """It is the active engine, and is watched."""
    COMMITTED = "COMMITTED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"
    ROLLED_BACK = "ROLLED_BACK"
    UNPROVEN = "UNPROVEN"
    SUPERSEDED = "SUPERSEDED"
    BESIDE = "BESIDE"


class Event(enum.Enum):
    """What happens to an activation."""

    DONE = "the work of its state is done"
    FAILED = "it does not go on"
    STRANDED = "it does not go on, and there is nothing to go back to"
    AGENT_ENDED = "the agent was started while it was under way"
    REPLACED = "another engine is activated"
    BESIDE = "it is to answer beside the active engine, not in its place"


TABLE: dict[tuple[State, Event], State] = {
    (State.VERIFYING, Event.DONE): State.LOADING,
    (State.VERIFYING, Event.FAILED): State.FAILED,
    (State.VERIFYING, Event.AGENT_ENDED): State.INTERRUPTED,
    (State.LOADING, Event.DONE): State.CANARY,
    (State.LOADING, Event.FAILED): State.FAILED,
    (State.LOADING, Event.AGENT_ENDED): State.INTERRUPTED,
    # From here on the engine is the active one.
    (State.CANARY, Event.DONE): State.PROBATION,
    (State.CANARY, Event.BESIDE): State.BESIDE,
    (State.CANARY, Event.FAILED): State.FAILED,
    (State.CANARY, Event.AGENT_ENDED): State.INTERRUPTED,
    (State.PROBATION, Event.DONE): State.COMMITTED,
    # Back to the one before: as soon as this is on disk, that is the active one.
    (State.PROBATION, Event.FAILED): State.ROLLED_BACK,
    (State.PROBATION, Event.STRANDED): State.UNPROVEN,
    (State.PROBATION, Event.REPLACED): State.SUPERSEDED,
    # Its probation begins anew, but not for ever: the starts are counted.
    (State.PROBATION, Event.AGENT_ENDED): State.PROBATION,
}


def under_way(state: State) -> bool:
    """Whether something is still to be done."""
    return any(state is known for known, _ in TABLE)


def after(state: State, event: Event) -> State:
    """The next state; raises ValueError for an event that cannot happen in this one."""
    try:
        return TABLE[state, event]
    except KeyError:
        raise ValueError(f"{event.name} cannot happen to an activation that is {state.value}") from None
