"""The contract between what reads a device and what takes records of it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from edgellm.v1 import telemetry_pb2

PartName: TypeAlias = Literal["thermal", "power", "compute", "memory"]
Part: TypeAlias = telemetry_pb2.Thermal | telemetry_pb2.Power | telemetry_pb2.Compute | telemetry_pb2.Memory


@dataclass(frozen=True)
class Clock:
    """Time as the telemetry sees it; a test passes its own."""

    wall_ns: Callable[[], int] = time.time_ns
    monotonic_ns: Callable[[], int] = time.monotonic_ns
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Probe(Protocol):
    """Reads one part of the record.

    A probe is read on a thread of the sampler, by one thread at a time, and may block.
    """

    @property
    def part(self) -> PartName:
        """The field of `Telemetry` that this probe fills."""

    def read(self) -> Part | None:
        """Give the part as it is now, in a message of its own; None where the device has nothing of it.

        A figure that cannot be read is left absent, never set to zero.
        """


class Source(Protocol):
    """Everything that can be read on one kind of device."""

    @property
    def name(self) -> str:
        """For the log: "sysfs", "host", "jtop", "replay"."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        """At most one per part."""

    def close(self) -> None:
        """Let go of processes, threads and files.

        No probe is read after it; a second call does nothing.
        """
