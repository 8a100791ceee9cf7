"""Command line of the agent: `edgellm-agent run --config agent.toml`."""

from __future__ import annotations

import asyncio
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from edgellm.errors import EdgellmError
from edgellm_agent import daemon
from edgellm_agent.config import load_settings
from edgellm_agent.errors import AgentError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The edgellm device agent.")


@app.command()
def run(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Settings file (TOML); EDGELLM_AGENT_* variables override it."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run the agent in the foreground until SIGTERM; running requests get `drain_s` seconds to end.

    A small settings file:

        device = "jetson-01"
        profile = "orin-nano-8gb"
        state_dir = "/var/lib/edgellm"
        socket = "/run/edgellm/agent.sock"

        [mqtt]
        host = "broker.local"
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    try:
        asyncio.run(daemon.run(load_settings(config)))
    except (EdgellmError, AgentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if hint := getattr(error, "hint", ""):
            print(f"  try: {hint}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def version() -> None:
    """Print the agent's version."""
    print(metadata.version("edgellm"))


def main() -> None:
    """Console script."""
    app()
