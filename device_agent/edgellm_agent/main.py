"""Command line of the agent: `edgellm-agent run --config agent.toml`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from edgellm.errors import EdgellmError
from edgellm_agent import daemon, doctor
from edgellm_agent.config import load_settings
from edgellm_agent.errors import AgentError
from edgellm_agent.governor.commands import power_mode_helper
from edgellm_agent.telemetry.base import Clock
from edgellm_agent.telemetry.detect import open_source
from edgellm_agent.telemetry.replay import ReplaySource
from edgellm_agent.worker.sandbox import privileges

log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The edgellm device agent.")

TelemetryOption = Annotated[
    str | None,
    typer.Option(
        "--telemetry",
        metavar="SOURCE",
        help="Where figures come from: auto, sysfs, host, jtop, replay:FILE[?speed=N] or a shipped scenario: "
        "replay:heat-up, replay:over-current, replay:fan-failure.",
    ),
]


@app.command()
def run(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Settings file (TOML); EDGELLM_AGENT_* variables override it."),
    ] = None,
    telemetry: TelemetryOption = None,
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
    # The worker runs as the same user, and takes what strangers made: it must not read the agent's memory.
    privileges.hide_memory()
    if os.geteuid() == 0:
        log.warning("the agent runs as root; a user of its own is enough, see docs/hardening.md")
    overrides = {} if telemetry is None else {"telemetry_source": telemetry}
    with _explained():
        asyncio.run(daemon.run(load_settings(config, overrides)))


@app.command("doctor")
def examine(
    *,
    telemetry: TelemetryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")] = False,
    record_sysfs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record the board's files into a new FILE (.jsonl or .jsonl.gz)."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, max=21_600, help="How long to record.")] = 60.0,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between snapshots.")] = 1.0,
    root: Annotated[Path, typer.Option(hidden=True, help="Where /sys and /proc are; for tests.")] = Path("/"),
) -> None:
    """Show which figures this machine tells, which not and why; exit status 1 if a needed one is missing.

    With --record-sysfs, record what its sensors say instead; `run --telemetry replay:FILE` plays it back.
    """
    clock = Clock()
    with _explained():
        if record_sysfs is not None:
            doctor.record_sysfs(root, record_sysfs, seconds, interval, clock)
            return
        with contextlib.closing(open_source(telemetry or "auto", root, clock)) as source:
            reading = asyncio.run(doctor.examine(source, clock))
            where = source.root if isinstance(source, ReplaySource) else root
            diagnosis = doctor.diagnose(source, reading, where)
    doctor.report(diagnosis, as_json=as_json)
    if not diagnosis.healthy:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the agent's version."""
    print(metadata.version("edgellm"))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (EdgellmError, AgentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if hint := getattr(error, "hint", ""):
            print(f"  try: {hint}", file=sys.stderr)
        raise typer.Exit(1) from None


app.command()(power_mode_helper)


def main() -> None:
    """Console script."""
    app()
