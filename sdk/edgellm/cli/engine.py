"""Commands about the engines on a device."""

from __future__ import annotations

from typing import Annotated

import typer

from edgellm.cli.bundle import plan_facts
from edgellm.cli.output import (
    DeviceOption,
    JsonOption,
    TimeoutOption,
    human_bytes,
    note,
    print_facts,
    print_json,
    print_table,
)

app = typer.Typer(help="See, activate, pin and remove the engines on a device.", no_args_is_help=True)

EngineArgument = Annotated[str, typer.Argument(help="Digest of the engine, or its name if only one has it.")]


@app.command("list")
def list_(device: DeviceOption, json_: JsonOption = False) -> None:
    """List the engines on a device."""
    from edgellm.client import Client

    with Client.for_device(device) as client:
        engines = client.engines()
    if json_:
        print_json({"engines": engines})
        return
    rows = [
        (
            item.name,
            "yes" if item.active else "",
            item.precision,
            item.runtime,
            human_bytes(item.size_bytes),
            f"{item.added_at:%Y-%m-%d %H:%M}",
            item.digest,
        )
        for item in engines
    ]
    print_table(("NAME", "ACTIVE", "PRECISION", "RUNTIME", "SIZE", "ADDED (UTC)", "DIGEST"), rows)


@app.command()
def activate(
    engine: EngineArgument, device: DeviceOption, timeout: TimeoutOption = 600.0, json_: JsonOption = False
) -> None:
    """Make an engine the one that answers; if it fails, the device stays with the one it had."""
    from edgellm.client import Client

    with Client.for_device(device) as client:
        plan = client.activate(
            engine, lambda step: note(f"{step.phase} ...", shown=not json_), timeout_s=timeout
        )
    if json_:
        print_json({"engine": engine, "plan": plan})
    else:
        print_facts([("active", engine), *plan_facts(plan)])


@app.command()
def remove(engine: EngineArgument, device: DeviceOption, json_: JsonOption = False) -> None:
    """Remove an engine that is not active, and the files that no other engine needs."""
    from edgellm.client import Client

    with Client.for_device(device) as client:
        freed_bytes = client.remove(engine)
    if json_:
        print_json({"engine": engine, "freed_bytes": freed_bytes})
    else:
        typer.echo(f"removed {engine}: {human_bytes(freed_bytes)} came free")


@app.command()
def pin(device: DeviceOption, json_: JsonOption = False) -> None:
    """Keep the active engine, whatever the device's fleet desires, until it is unpinned."""
    _pin(device, pinned=True, json_=json_)


@app.command()
def unpin(device: DeviceOption, json_: JsonOption = False) -> None:
    """Give the device back to its fleet: it turns to what is desired of it last."""
    _pin(device, pinned=False, json_=json_)


def _pin(device: str, *, pinned: bool, json_: bool) -> None:
    from edgellm.client import Client

    with Client.for_device(device) as client:
        active = client.pin(pinned)
    if json_:
        print_json({"pinned": pinned, "active_engine": active})
    else:
        typer.echo(f"{'pinned to' if pinned else 'unpinned from'} {active or 'no engine'}")
