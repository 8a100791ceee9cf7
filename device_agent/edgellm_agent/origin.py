"""Who asked for a change of engines, and how the change is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgellm.v1 import fleet_pb2
from edgellm_agent.errors import PreconditionError
from edgellm_agent.events import Events


@dataclass(frozen=True)
class Origin:
    """A call to the device's own API, or its fleet by a generation."""

    name: Literal["local", "desired"]
    generation: int = 0


LOCAL = Origin("local")


class PinnedError(PreconditionError):
    """The fleet may not replace the active engine: somebody at the device has pinned it."""


def tell_change(
    events: Events, what: str, engine: str, by: Origin | None, *, previous: str = "", error: str = ""
) -> None:
    """Tells a step in an engine's life; what nobody asked for (`by` None) is not told."""
    if by is not None:
        change = fleet_pb2.EngineChanged(what=what, engine=engine, previous=previous, error=error)
        change.origin, change.generation = by.name, by.generation
        events.tell(change)
