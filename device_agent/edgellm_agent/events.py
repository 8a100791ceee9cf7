"""What happened on the device: whoever knows it tells it, and whoever wants to know (the fleet) listens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

from edgellm.v1 import fleet_pb2

log = logging.getLogger(__name__)

Happening: TypeAlias = fleet_pb2.GovernorChanged | fleet_pb2.EngineChanged | fleet_pb2.WorkerEnded
Listener: TypeAlias = Callable[[Happening], None]


class Events:
    """Hands each event to every listener, at once and on the event loop."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Adds a listener, for good; it must not block."""
        self._listeners.append(listener)

    def tell(self, happening: Happening) -> None:
        """Tells all listeners; one that fails keeps it from nobody else."""
        for listener in self._listeners:
            try:
                listener(happening)
            except Exception:  # noqa: PERF203 - who tells must not suffer for who listens
                log.exception("events.listener_failed kind=%s", happening.DESCRIPTOR.name)
