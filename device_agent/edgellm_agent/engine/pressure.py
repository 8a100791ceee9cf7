"""Memory pressure: how much KV cache an engine may hold while others on the board need memory too."""

from __future__ import annotations

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


@dataclass
class PressureGuard:
    """Moves the bound of the KV cache between what was granted and a floor.

    Half of the headroom is a reserve: when others have eaten into it, or into the other half and stall for
    want of memory, the cache gives back what is missing; it takes it again when more than the whole is free.

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
        pressed = missing > self.headroom_bytes // 2 or (
            now.stalled_percent >= _STALLED_PERCENT and missing > 0
        )
        if pressed:
            # No further down than to what is held less what is missing: more would free nothing.
            held_bytes = max(0, used_bytes - max(missing, step))
            self.bound_bytes = min(self.bound_bytes, max(self.floor_bytes, held_bytes))
        elif missing < 0 and now.stalled_percent < _CALM_PERCENT:
            self.bound_bytes = min(self.granted_bytes, self.bound_bytes + min(step, -missing // 2))
        return self.bound_bytes
