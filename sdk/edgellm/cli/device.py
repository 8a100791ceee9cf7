"""Commands about the devices that this machine knows."""

from __future__ import annotations

from typing import Annotated

import typer

from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json, print_table

app = typer.Typer(help="Name devices, and see what they are.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of the device.")]


@app.command()
def add(
    name: NameArgument,
    target: Annotated[str, typer.Argument(help="unix:///run/edgellm/agent.sock or HOST:PORT.")],
    json_: JsonOption = False,
) -> None:
    """Give a device a name on this machine, or a known one a new address.

    \b
    edgellm device add jetson-01 192.0.2.7:7400
    edgellm device add here unix:///run/edgellm/agent.sock
    """
    from edgellm.devices import DeviceBook

    device = DeviceBook().add(name, target)
    if json_:
        print_json(device)
    else:
        typer.echo(f"{device.name} is at {device.target}")


@app.command("list")
def list_(json_: JsonOption = False) -> None:
    """List the known devices."""
    from edgellm.devices import DeviceBook

    devices = DeviceBook().all()
    if json_:
        print_json({"devices": devices})
    elif devices:
        print_table(("NAME", "ADDRESS"), [(device.name, device.target) for device in devices])
    else:
        typer.echo("no devices yet; add one with `edgellm device add NAME HOST:PORT`")


@app.command()
def info(name: NameArgument, json_: JsonOption = False) -> None:
    """Ask a device what it is and has."""
    from edgellm.client import Client

    with Client.for_device(name) as client:
        facts = client.info()
    if json_:
        print_json(facts)
        return
    memory = (
        f"{human_bytes(facts.memory_available_bytes)} of {human_bytes(facts.memory_total_bytes)} available"
    )
    print_facts(
        [
            ("device", facts.device),
            ("agent", facts.agent_version),
            ("profile", facts.profile + (" (simulated)" if facts.simulated else "")),
            (
                "runtimes",
                ", ".join(f"{runtime.name} {runtime.version}" for runtime in facts.runtimes) or "none",
            ),
            ("memory", memory),
            ("disk", f"{human_bytes(facts.disk_free_bytes)} free"),
            ("engine", facts.active_engine or "none"),
        ]
    )


@app.command()
def remove(name: NameArgument, json_: JsonOption = False) -> None:
    """Forget a device; nothing changes on the device itself."""
    from edgellm.devices import DeviceBook

    device = DeviceBook().remove(name)
    if json_:
        print_json(device)
    else:
        typer.echo(f"forgot {device.name}")
