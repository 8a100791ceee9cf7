"""`edgellm device setup`: installs the agent on a device over ssh."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli.output import JsonOption, print_facts, print_json, printable


def setup(
    target: Annotated[str, typer.Argument(metavar="ssh://USER@HOST", help="Where ssh logs in.")],
    name: Annotated[str | None, typer.Option(help="Name of the device; default: the host's.")] = None,
    profile: Annotated[
        str, typer.Option(help="Device profile; `edgellm device profiles` lists them.")
    ] = "orin-nano-8gb",
    wheels: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Install these wheels, offline."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Where the agent is installed.")] = "/opt/edgellm",
    service: Annotated[bool, typer.Option(help="Install a user and systemd units, and start them.")] = True,
    gpu: Annotated[bool, typer.Option(help="Let the service have the GPU's devices.")] = False,
    system_packages: Annotated[
        bool, typer.Option("--system-packages", help="Let the agent see the system's Python packages.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, change nothing.")] = False,
    ssh_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="ssh's configuration, in place of your own.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Install the agent on a device over ssh, start it, and add the device to the known ones.

    Needs root there: log in as root, or as a user whom sudo asks for no password. Settings that are there are
    kept. Run it again after a failure, or to bring a newer agent: what is done is not done twice.

    \b
    edgellm device setup ssh://root@jetson-01 --dry-run
    edgellm device setup ssh://root@jetson-01 --wheels dist
    edgellm device setup ssh://me@192.0.2.7 --name bench --no-service --prefix /home/me/edgellm
    """
    from edgellm.devices import DeviceBook, SshTarget
    from edgellm.profiles import load_profile
    from edgellm.setup import Options, Outcome, RemoteShell, carry_out, examine, plan
    from edgellm.setup.facts import check

    ssh = SshTarget.parse(target)
    load_profile(profile)
    options = Options(name or ssh.host, profile, prefix, wheels, service, system_packages, gpu)
    facts = examine(RemoteShell(ssh, config=ssh_config), prefix)
    check(facts, service=service)
    shell = RemoteShell(ssh, sudo=not facts.root, config=ssh_config)

    def tell(outcome: Outcome) -> None:
        if not json_:
            typer.echo(f"{outcome.state:<8} {printable(outcome.title)}")

    outcomes = carry_out(shell, plan(options, facts), dry_run=dry_run, tell=tell)
    if not dry_run:
        address = target.rstrip("/") if service else _address(target, ssh.socket, options.socket)
        DeviceBook().add(options.device, address)
    if json_:
        print_json({"device": options.device, "facts": facts, "steps": outcomes})
    elif not dry_run:
        start = [] if service else [("start", options.command)]
        print_facts([("device", options.device), *start])


def _address(target: str, named: str, socket: str) -> str:
    """The address with the agent's socket in it."""
    return target.removesuffix("/").removesuffix(named) + socket
