"""What an operator may set about access: `[access]` and `[tls]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

RoleName = Literal["viewer", "app", "operator", "admin"]

# A user's or (behind @) a group's name as shadow-utils takes them, or its number.
_WHO = re.compile(r"@?([a-zA-Z_][a-zA-Z0-9_.-]{0,31}\$?|[0-9]{1,10})")


def _who(value: str) -> str:
    if not _WHO.fullmatch(value):
        raise ValueError(
            f'must be a user or a group, as "alice", "1000", "@robots" or "@1000", not {value!r}'
        )
    return value


Who = Annotated[str, AfterValidator(_who)]
WhoList = Annotated[tuple[Who, ...], Field(max_length=256)]


class AccessSettings(BaseModel):
    """Who on this machine may do what, and how much at once.

    Users are names or numbers, groups begin with "@". Root and the agent's own user are always admins;
    whoever stands in several lists has the highest of these roles.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    admins: WhoList = ()
    operators: WhoList = ("@edgellm-operators",)
    apps: WhoList = ()
    viewers: WhoList = ()
    others: RoleName | Literal["none"] = Field(
        default="app", description="role of whoever may open the socket and is in no list"
    )
    max_connections: int = Field(default=256, ge=1, le=4096, description="to the Unix socket, of all users")
    max_connections_per_user: int = Field(default=64, ge=1, le=4096)
    max_calls: int = Field(default=128, ge=1, le=4096, description="calls under way, per caller")
    max_streams: int = Field(
        default=32, ge=1, le=4096, description="of these, calls that last until the client goes away"
    )
    upload_bytes_per_s: int | None = Field(
        default=None, ge=65_536, description="most that one caller may push; default: no limit"
    )


class TlsSettings(BaseModel):
    """TLS of the gRPC API on TCP: both sides show certificates of the same authority.

    The files are read again when they change, so that nothing has to be restarted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_file: Path = Field(description="authorities whose certificates clients must have (PEM)")
    cert_file: Path = Field(description="this device's own certificate (PEM)")
    key_file: Path = Field(description="its private key (PEM, not encrypted)")
    crl_file: Path | None = Field(
        default=None, description="revoked certificates (PEM), signed by an authority"
    )


def check_listen(listen: str | None, tls: TlsSettings | None) -> None:
    """Raises ValueError where the API would be open to whoever can reach a port."""
    if listen is not None and tls is None:
        raise ValueError(
            f"listen = {listen!r} needs a [tls] table with ca_file, cert_file and key_file (`edgellm pki` "
            "makes them): any user and program on this machine could connect to a port, also on loopback; "
            "without `listen` the API is on the Unix socket alone"
        )
    if listen is None and tls is not None:
        raise ValueError("[tls] is of no use without `listen`, the address of the API")
