"""What an operator may set of the governor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

StateName = Literal["NOMINAL", "WARM", "HOT", "CRITICAL"]
# What nvpmodel may call a mode ("15W", "MAXN_SUPER"); nothing that a shell or a path could read otherwise.
MODE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_+.-]{0,31}$"
ModeName = Annotated[str, Field(pattern=MODE_PATTERN)]
_Margin = Annotated[float, Field(gt=0, le=60)]


class GovernorSettings(BaseModel):
    """Margins are degrees Celsius below the trip point at which the board would throttle itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    target_margin_celsius: _Margin = Field(default=3.0, description="where a loaded board is held")
    warm_margin_celsius: _Margin = 10.0
    hot_margin_celsius: _Margin = 5.0
    critical_margin_celsius: _Margin = Field(default=1.0, description="new requests are refused from here on")
    trip_celsius: float | None = Field(
        default=None, ge=30, le=120, description="for boards that tell no trip point, or to stay below it"
    )
    power_budget_mw: float | None = Field(default=None, ge=1000, le=1_000_000)
    min_pace: float = Field(
        default=0.02, ge=0.01, le=1, description="least share of time in which the engine computes"
    )
    power_modes: dict[StateName, ModeName] = Field(
        default_factory=dict, description="power mode by state; needs the power mode helper"
    )
    power_mode_socket: Path = Path("/run/edgellm/power-mode.sock")

    @model_validator(mode="after")
    def _ordered(self) -> GovernorSettings:
        margins = (
            self.critical_margin_celsius,
            self.target_margin_celsius,
            self.hot_margin_celsius,
            self.warm_margin_celsius,
        )
        if not list(margins) == sorted(set(margins)):
            raise ValueError("margins must rise in the order critical, target, hot, warm")
        return self
