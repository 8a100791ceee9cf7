"""The command that shows devices as they are now, and goes on showing them."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import IntervalOption, JsonOption, print_json
from edgellm.json_form import to_fields

if TYPE_CHECKING:
    from edgellm.cli.watching import Watch
    from edgellm.devices import Device


def top(
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Name or address; may be given more than once. Default: all known."),
    ] = None,
    interval: IntervalOption = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one table and end; so it is in a pipe.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Watch devices: governor, heat, power, memory, engine, tokens per second and per joule.

    One device fills the screen; many are a line each. A device that cannot be reached says so in its line, is
    tried again, and holds up no other. `q` or Ctrl-C ends. --json prints one line per device and ends.

    \b
    edgellm top                                  all devices that this machine knows
    edgellm top --device jetson-01               all about one
    edgellm top --once | grep -v NOMINAL         those that are not well
    edgellm top --json | jq -r 'select(.error) | .device'
    """
    from edgellm.cli import live

    live.quiet_grpc()
    devices = _chosen(device or [])
    if once or json_ or not sys.stdout.isatty():
        _print_once(devices, interval, as_json=json_)
    else:
        live.run_until_interrupted(_show(devices, interval))


def _chosen(names: list[str]) -> list[Device]:
    from edgellm.devices import DeviceBook
    from edgellm.errors import EdgellmError

    book = DeviceBook()
    devices = [book.find(name) for name in dict.fromkeys(names)] if names else book.all()
    if not devices:
        raise EdgellmError(
            "no devices are known on this machine", "add one with `edgellm device add NAME HOST:PORT`"
        )
    return devices


async def _show(devices: list[Device], interval_s: float) -> None:
    from rich.console import Console

    from edgellm.cli import live, screens
    from edgellm.cli.watching import Watch

    loop = asyncio.get_running_loop()
    async with Watch(devices, interval_s) as watch:
        await live.show(
            Console(),
            lambda width, height: screens.screen(watch.devices, loop.time(), width, height),
            min(interval_s, 1.0),
            screen=True,
        )


def _print_once(devices: list[Device], interval_s: float, *, as_json: bool) -> None:
    """Prints what each device says first; exit code 1 if none says anything."""
    answered = asyncio.run(_once(devices, interval_s, as_json=as_json))
    if not answered:
        raise typer.Exit(1)


async def _once(devices: list[Device], interval_s: float, *, as_json: bool) -> bool:
    from edgellm.cli.watching import Watch

    async with Watch(devices, interval_s) as watch:
        # Each first try has a deadline of its own.
        await watch.settled.wait()
        now_s = asyncio.get_running_loop().time()
    if as_json:
        _print_lines(watch)
    else:
        _print_table(watch, now_s)
    return any(device.record is not None for device in watch.devices)


def _print_lines(watch: Watch) -> None:
    for device in watch.devices:
        found = (
            {"error": device.failure} if device.record is None else {"telemetry": to_fields(device.record)}
        )
        print_json({"device": device.name, "target": device.target, **found})


def _print_table(watch: Watch, now_s: float) -> None:
    from rich.console import Console

    from edgellm.cli import screens

    console = Console()
    # A pipe takes whole lines, however long they are; there is nothing to plot yet.
    width = console.width if console.is_terminal else None
    for line in screens.lines(watch.devices, now_s, width, live=False):
        if width is None:
            typer.echo(line.plain.rstrip())
        else:
            console.print(line)
