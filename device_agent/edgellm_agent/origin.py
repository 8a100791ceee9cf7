"""Who asked for a change of engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgellm_agent.errors import PreconditionError


@dataclass(frozen=True)
class Origin:
    """A call to the device's own API, or its fleet by a generation."""

    name: Literal["local", "desired"]
    generation: int = 0
    actor: str = ""
    """Who called, for example "uid 1000"; empty for the fleet."""


LOCAL = Origin("local")


class PinnedError(PreconditionError):
    """The fleet may not replace the active engine: somebody at the device has pinned it."""
