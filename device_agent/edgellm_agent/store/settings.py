"""What an operator may set of the engine store: `[store]`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class StoreSettings(BaseModel):
    """How much of the disk engines may take, and how often their files are read again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spare_bytes: int = Field(default=256 << 20, ge=0, description="disk space that is left to others")
    scrub_interval_h: float = Field(
        default=24, ge=0, le=8760, description="hours between two readings of every file; 0: never"
    )
    scrub_first_h: float = Field(
        default=1, ge=0, le=8760, description="hours from the agent's start to its first reading"
    )
    scrub_bytes_per_s: int = Field(
        default=8 << 20, ge=1 << 16, le=1 << 32, description="most that it reads of the disk"
    )
