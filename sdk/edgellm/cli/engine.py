"""Commands about the engines on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import (
    DeviceOption,
    JsonOption,
    TimeoutOption,
    human_bytes,
    note,
    print_facts,
    print_json,
    print_table,
    printable,
    short_digest,
)
from edgellm.cli.plan import plan_facts

if TYPE_CHECKING:
    from edgellm.client import ActivationStep

app = typer.Typer(
    help="See, activate, go back from, pin and remove the engines on a device.", no_args_is_help=True
)

WaitOption = Annotated[bool, typer.Option("--wait", help="Wait until the engine has passed its probation.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Though a program holds the engines.")]
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
            item.state.lower(),
            "*" if item.active else "",
            item.precision,
            item.runtime,
            human_bytes(item.size_bytes),
            str(item.release or ""),
            ", ".join(item.signed_by),
            f"{item.added_at:%Y-%m-%d %H:%M}",
            item.digest,
        )
        for item in engines
    ]
    heads = ("NAME", "STATE", "DEFAULT", "PRECISION", "RUNTIME", "SIZE", "RELEASE", "SIGNED BY")
    print_table((*heads, "ADDED (UTC)", "DIGEST"), rows)


@app.command()
def activate(
    engine: EngineArgument,
    device: DeviceOption,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Have it answer by its name, beside the default engine."),
    ] = False,
    wait: WaitOption = False,
    force: ForceOption = False,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Make an engine the one that answers; if it fails, the device stays with the one it had.

    From its first answer on the engine is on probation. If its worker dies or hangs, or its requests fail,
    the device goes back to the engine before.

    \b
    edgellm engine activate smollm2-int8 --device jetson-01 --wait
    edgellm engine activate tiny-tools --beside --device jetson-01
    """
    from edgellm.client import Client

    with Client.for_device(device) as client:
        plan = client.activate(
            engine,
            lambda step: _tell(step, shown=not json_),
            beside=beside,
            force=force,
            until_committed=wait,
            timeout_s=timeout,
        )
    if json_:
        print_json({"engine": engine, "beside": beside, "committed": wait, "plan": plan})
    else:
        print_facts([("beside" if beside else "active", engine), *plan_facts(plan)])


@app.command()
def deactivate(
    engine: EngineArgument, device: DeviceOption, force: ForceOption = False, json_: JsonOption = False
) -> None:
    """Take an engine that answers beside the default one out of memory; it stays on the disk."""
    from edgellm.client import Client

    with Client.for_device(device) as client:
        client.deactivate(engine, force=force)
    if json_:
        print_json({"engine": engine})
    else:
        typer.echo(f"{engine} no longer answers on {device}")


@app.command()
def rollback(
    device: DeviceOption,
    wait: WaitOption = False,
    force: ForceOption = False,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Go back to the engine that was committed before the present one."""
    from edgellm.client import Client

    with Client.for_device(device) as client:
        plan = client.roll_back(
            lambda step: _tell(step, shown=not json_), force=force, until_committed=wait, timeout_s=timeout
        )
        active = next(item for item in client.engines() if item.active)
    if json_:
        print_json({"engine": active.digest, "name": active.name, "plan": plan})
    else:
        print_facts([("active", f"{active.name} ({active.digest})"), *plan_facts(plan)])


@app.command()
def history(
    device: DeviceOption,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most entries.")] = 30,
    json_: JsonOption = False,
) -> None:
    """Print what happened to a device's engines, the latest first; times are UTC, by the device's clock."""
    from edgellm.client import Client

    with Client.for_device(device) as client:
        entries = client.history(limit)
        names = {item.digest: item.name for item in client.engines()}
    if json_:
        print_json({"history": entries})
        return
    rows = [
        (
            f"{entry.time:%Y-%m-%d %H:%M:%S}",
            entry.what,
            names.get(entry.engine, ""),
            short_digest(entry.engine),
            entry.actor or (f"fleet, generation {entry.generation}" if entry.generation else "device"),
            printable(entry.error),
        )
        for entry in entries
    ]
    print_table(("TIME (UTC)", "WHAT", "NAME", "DIGEST", "BY", "WHY"), rows)


def _tell(step: ActivationStep, *, shown: bool) -> None:
    watched = f" for {step.probation_s:.0f} s" if step.probation_s else ""
    note(f"{step.phase}{watched} ...", shown=shown)


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
