"""What an operator may set about trust: `[trust]`."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class TrustSettings(BaseModel):
    """Which keys come with the device, and whether it asks for signatures before it has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_dir: Path | None = Field(
        default=None, description="folder of .pub.json or .pem files that are trusted from the first start on"
    )
    required: bool = Field(
        default=False, description="refuse unsigned engines though no key is trusted; keys_dir means the same"
    )
