"""What an operator may set of the life of engines."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LifecycleSettings(BaseModel):
    """How an engine becomes the one to rely on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probation_s: float = Field(
        default=120, ge=0, le=86_400, description="a new engine is watched for so long before it is committed"
    )
    probation_starts: int = Field(
        default=3, ge=1, le=100, description="so often may the agent start within one probation"
    )
    hang_s: float = Field(
        default=30,
        ge=1,
        le=3600,
        description="a worker that says nothing for so long, though asked, is killed",
    )
    loop_deaths: int = Field(default=5, ge=2, le=100, description="so many deaths of workers ...")
    loop_window_s: float = Field(
        default=600, ge=1, le=86_400, description="... within so long make the device go back"
    )
