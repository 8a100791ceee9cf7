"""Device profiles: the figures of each board, one TOML file per module: a correction is a data change."""

from __future__ import annotations

from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgellm import toml
from edgellm.errors import EdgellmError

Positive = Annotated[int, Field(gt=0)]


class DeviceProfile(BaseModel):
    """One kind of board; a figure that is unknown or has no meaning for it is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    architecture: Literal["any", "amd64", "arm64"]
    sm: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    memory_bytes: Positive | None = Field(default=None, description="memory that the module is sold with")
    usable_bytes: Positive | None = Field(default=None, description="what is left of it after a fresh boot")
    usable_from: str = Field(description="where usable_bytes comes from: a source or an assumption")
    headroom_bytes: Positive = Field(description="left to everybody else by default")
    bandwidth_gb_per_s: float | None = None
    bandwidth_super_gb_per_s: float | None = Field(default=None, description="in the Super power modes")
    cuda_cores: Positive | None = None
    tensor_cores: Positive | None = None
    power_modes: tuple[str, ...] = Field(
        default=(), description="by name, as nvpmodel prints them; numbers differ"
    )
    power_max_w: Positive | None = None
    part_numbers: tuple[str, ...] = ()
    stacks: tuple[str, ...] = Field(default=(), description="software stacks that support it")


def profile_names() -> list[str]:
    """Names of the known profiles, sorted."""
    names = (entry.name for entry in resources.files(__package__).iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_profile(name: str) -> DeviceProfile:
    """The profile of that name; raises EdgellmError, which lists the names that there are."""
    names = profile_names()
    if name not in names:
        raise EdgellmError(f"unknown profile {name!r:.80}", f"known profiles: {', '.join(names)}")
    text = resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return DeviceProfile.model_validate(toml.loads(text))
