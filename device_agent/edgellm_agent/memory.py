"""What this device really has for engines: MemAvailable, or a declared profile's limit if that is less."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgellm.bundle.config import EngineConfig
from edgellm.memory import MemoryPlan, mem_available_bytes, plan_memory
from edgellm.profiles import DeviceProfile


@dataclass(frozen=True)
class MemoryPolicy:
    """How engines share the device's memory with everybody else.

    `simulated` enforces the profile's usable bytes on a machine that has more.
    """

    profile: DeviceProfile
    simulated: bool
    headroom_bytes: int
    context_tokens: int
    max_sequences: int
    prefill_tokens: int
    root: Path = Path("/")

    def available_bytes(self, resident_bytes: int = 0, reserved_bytes: int = 0) -> int:
        """Memory for a new engine beside one that runs.

        Args:
            resident_bytes: What the running engine holds: MemAvailable shows it, a simulated limit does not.
            reserved_bytes: What was granted to it and is not resident yet; nothing else shows it.

        """
        available = mem_available_bytes(self.root)
        if self.simulated and self.profile.usable_bytes is not None:
            available = min(available, self.profile.usable_bytes - resident_bytes)
        return max(0, available - reserved_bytes)

    def available_in_place_of(self, resident_bytes: int) -> int:
        """Memory for a new engine once the running one, which holds so much, is gone."""
        available = mem_available_bytes(self.root) + resident_bytes
        if self.simulated and self.profile.usable_bytes is not None:
            available = min(available, self.profile.usable_bytes)
        return available

    def plan(self, config: EngineConfig, available_bytes: int) -> MemoryPlan:
        """Divides so many bytes; raises DoesNotFitError with the figures."""
        return plan_memory(
            config,
            available_bytes=available_bytes,
            headroom_bytes=self.headroom_bytes,
            context_tokens=self.context_tokens,
            max_sequences=self.max_sequences,
            prefill_tokens=self.prefill_tokens,
        )
