"""Who calls, and in which role."""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass


class Role(enum.IntEnum):
    """What a caller may do; each role may all that the ones before it may."""

    VIEWER = 1
    """Looks: state, telemetry."""
    APP = 2
    """Asks the engine, and holds it while it must not be replaced."""
    OPERATOR = 3
    """Brings, activates, removes engines; reads logs."""
    ADMIN = 4
    """Decides whose signatures count; reads who did what."""

    def __str__(self) -> str:
        """As settings and messages have it."""
        return self.name.lower()


@dataclass(frozen=True)
class Caller:
    """Somebody who has been recognised; `name` is for people and the audit log, for example "uid 1000"."""

    name: str
    role: Role


# What the agent does by itself.
AGENT = Caller("", Role.ADMIN)

_current: ContextVar[Caller] = ContextVar("caller", default=AGENT)


def current() -> Caller:
    """Who made the call that is being answered; AGENT outside of calls."""
    return _current.get()


def begin(caller: Caller) -> None:
    """From here on the present task, and those that it starts, answer this caller."""
    _current.set(caller)
