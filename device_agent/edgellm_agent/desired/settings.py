"""What an operator may set about the fleet's wishes: `[desired]` and `[commands]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from edgellm_agent.desired.sources import parse_entry


def _entry(value: str) -> str:
    parse_entry(value)
    return value


Entry = Annotated[str, AfterValidator(_entry)]
CommandName = Literal["report", "restart-engine", "logs"]


class DesiredSettings(BaseModel):
    """Where engines may come from when the fleet asks for them, and how they are fetched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[Entry, ...] = Field(
        default=(), max_length=64, description='for example "https://host/path/" or "oci://host/repository"'
    )
    ca_file: Path | None = Field(default=None, description="trusted authorities (PEM); default: the system's")
    credentials_file: Path | None = Field(
        default=None, description="as `skopeo login --authfile` writes it; only its owner may read it"
    )
    max_bytes_per_s: int | None = Field(
        default=None, ge=65_536, description="most that a fetch takes of the network; default: no limit"
    )
    stall_s: float = Field(
        default=30, gt=0, le=600, description="a transfer in which nothing comes for so long is cut"
    )
    retry_first_s: float = Field(default=2, gt=0, le=60, description="pause after the first failure")
    retry_longest_s: float = Field(default=300, ge=1, le=86_400, description="longest pause between attempts")
    report_interval_s: float = Field(
        default=5, ge=0.1, le=3600, description="shortest time between two reports of a fetch's progress"
    )


class CommandSettings(BaseModel):
    """Which commands of the fleet the device obeys: none, unless they are listed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allow: frozenset[CommandName] = frozenset()
