"""Memory pressure: how much KV cache an engine may hold while others on the board need memory too."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.memory import mem_available_bytes
from edgellm_agent.telemetry.memory import pressure_some_percent

# Tasks that wait for memory this share of their time are as good as stopped; below the other, all is well.
_STALLED_PERCENT = 20.0
_CALM_PERCENT = 2.0
# The bound moves by at least, or at most, this part of what was granted: down fast, up with care.
_STEP = 8


@dataclass(frozen=True)
class Reading:
    """What the kernel says of memory."""

    available_bytes: int
    stalled_percent: float
    """Share of the last 10 s in which some task waited for memory (PSI); 0 where the kernel does not tell."""


def read_pressure(root: Path = Path("/")) -> Reading:
    """Reads it."""
    return Reading(mem_available_bytes(root), pressure_some_percent(root) or 0.0)


class Pressure(enum.Enum):
    """Whether others on the board lack memory. Half of the headroom is a reserve."""

    NONE = "more than the headroom is free, and nobody waits for memory"
    SOME = "in between: nothing should move"
    HIGH = "others have eaten into the reserve, or into the other half and stall for want of memory"

    @classmethod
    def of(cls, now: Reading, headroom_bytes: int) -> Pressure:
        """Judges a reading."""
        missing = headroom_bytes - now.available_bytes
        if missing > headroom_bytes // 2 or (now.stalled_percent >= _STALLED_PERCENT and missing > 0):
            return cls.HIGH
        return cls.NONE if missing < 0 and now.stalled_percent < _CALM_PERCENT else cls.SOME


@dataclass
class PressureGuard:
    """Moves the bound of the KV cache between what was granted and a floor.

    Under pressure the cache gives back what is missing; it takes it again once the headroom is whole.

    Args:
        granted_bytes: The bound at activation.
        floor_bytes: Least bound: an engine that can hold nothing is of no use.
        headroom_bytes: What the plan left to others.
        read: Asks the kernel.

    """

    granted_bytes: int
    floor_bytes: int
    headroom_bytes: int
    read: Callable[[], Reading] = read_pressure
    bound_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Begins with what was granted."""
        self.bound_bytes = self.granted_bytes

    def update(self, used_bytes: int) -> int:
        """The bound from now on, given what the cache holds."""
        now, step = self.read(), self.granted_bytes // _STEP
        missing = self.headroom_bytes - now.available_bytes
        match Pressure.of(now, self.headroom_bytes):
            case Pressure.HIGH:
                # No further down than to what is held less what is missing: more would free nothing.
                held_bytes = max(0, used_bytes - max(missing, step))
                self.bound_bytes = min(self.bound_bytes, max(self.floor_bytes, held_bytes))
            case Pressure.NONE:
                self.bound_bytes = min(self.granted_bytes, self.bound_bytes + min(step, -missing // 2))
        return self.bound_bytes
