"""The command that runs the privileged helper: `edgellm-agent power-mode-helper`."""

from __future__ import annotations

import logging
import os
import pwd
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgellm_agent.governor.power_mode_helper import NvpModel, PowerModeHelper, inherited, listen

log = logging.getLogger(__name__)


def power_mode_helper(
    allow: Annotated[
        str, typer.Option(help="Modes that may be switched to, by name: 15W,25W. None needs a reboot.")
    ],
    socket: Annotated[Path, typer.Option(help="Unix socket to listen on, if systemd brings none.")] = Path(
        "/run/edgellm/power-mode.sock"
    ),
    user: Annotated[str, typer.Option(help="User that the agent runs as; no other may ask.")] = "edgellm",
    nvpmodel: Annotated[Path, typer.Option(help="NVIDIA's tool.")] = Path("/usr/sbin/nvpmodel"),
) -> None:
    """Switch the power mode when the agent asks: the only part that needs root.

    It takes one line, the name of a mode that --allow lists, and runs nvpmodel.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    modes = frozenset(filter(None, map(str.strip, allow.split(","))))
    if not modes:
        raise typer.BadParameter("names no mode; list some, for example 15W,25W", param_hint="--allow")
    try:
        user_id = pwd.getpwnam(user).pw_uid
    except KeyError:
        raise typer.BadParameter(f"there is no user {user!r}", param_hint="--user") from None
    helper = PowerModeHelper(modes, user_id, NvpModel(nvpmodel))
    try:
        listener = inherited(os.environ) or listen(socket, user_id)
    except OSError as error:
        print(f"error: cannot listen on {socket}: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(1) from None
    with listener:
        log.info("listening on %s for %s, modes %s", listener.getsockname(), user, ", ".join(sorted(modes)))
        helper.serve(listener)
