"""Commands about the devices that this machine knows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli.output import (
    IntervalOption,
    JsonOption,
    human_bytes,
    print_facts,
    print_json,
    print_table,
    printable,
)
from edgellm.json_form import to_fields

if TYPE_CHECKING:
    from edgellm.client import AuditRecord, Client, LogLine
    from edgellm.v1.telemetry_pb2 import Governor, Telemetry

app = typer.Typer(help="Name devices, and see what they are and do.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of the device.")]
# A log may say nothing for hours: after so long the device is asked whether it is there.
_QUIET_S = 15.0
_GOVERNOR_S = 1.0
_LEVEL_COLORS = {"WARNING": typer.colors.YELLOW, "ERROR": typer.colors.RED, "CRITICAL": typer.colors.RED}


class Level(str, Enum):
    """Least level of a line."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


@app.command()
def add(
    name: NameArgument,
    target: Annotated[
        str,
        typer.Argument(
            help="ssh://[USER@]HOST[:PORT][/SOCKET], HOST:PORT, or unix:///run/edgellm/agent.sock."
        ),
    ],
    group: Annotated[
        list[str] | None, typer.Option("--group", help="A group that it belongs to; repeatable.")
    ] = None,
    ca: Annotated[Path | None, typer.Option("--ca", help="Authority of the device's certificate.")] = None,
    cert: Annotated[Path | None, typer.Option("--cert", help="Our certificate.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The key to it.")] = None,
    server_name: Annotated[
        str | None, typer.Option("--server-name", help="Name in the device's certificate, if not NAME.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Give a device a name on this machine, or a known one a new address.

    HOST:PORT speaks TLS, and both sides show a certificate: ours is that of `edgellm pki` unless --ca, --cert
    and --key name other files. Groups and files that a known device has stay, unless new ones are given.

    \b
    edgellm device add jetson-01 ssh://edge@192.0.2.7 --group street
    edgellm device add jetson-02 192.0.2.8:7400 --group street --group canary
    edgellm device add here unix:///run/edgellm/agent.sock
    """
    from edgellm.devices import DeviceBook, TlsFiles

    ca, cert, key = (None if path is None else path.absolute() for path in (ca, cert, key))
    files = TlsFiles(ca, cert, key, server_name or "")
    device = DeviceBook().add(name, target, groups=group, tls=None if files == TlsFiles() else files)
    if json_:
        print_json(device)
    else:
        groups = f", in {', '.join(device.groups)}" if device.groups else ""
        typer.echo(f"{device.name} is at {device.target}{groups}")


@app.command("list")
def list_(json_: JsonOption = False) -> None:
    """List the known devices, their groups, and over what each is reached."""
    from edgellm.devices import DeviceBook

    devices = DeviceBook().all()
    if json_:
        print_json({"devices": devices})
    elif devices:
        rows = [(device.name, device.over, device.target, ", ".join(device.groups)) for device in devices]
        print_table(("NAME", "OVER", "ADDRESS", "GROUPS"), rows)
    else:
        typer.echo("no devices yet; add one with `edgellm device add NAME ssh://USER@HOST`")


@app.command()
def info(name: NameArgument, json_: JsonOption = False) -> None:
    """Ask a device what it is and has."""
    from edgellm.client import Client

    with Client.for_device(name) as client:
        facts, governor = client.info(), _governor(client)
    if json_:
        print_json({**asdict(facts), "governor": None if governor is None else to_fields(governor)})
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
            *([] if governor is None else [("governor", ", ".join([governor.state, *governor.reasons]))]),
        ]
    )


def _governor(client: Client) -> Governor | None:
    """How the governor feels, if the device has one and says so soon."""
    from edgellm.errors import EdgellmError

    with suppress(EdgellmError):
        for record in client.watch_telemetry(timeout_s=_GOVERNOR_S):
            return record.governor if record.HasField("governor") else None
    return None


@app.command()
def telemetry(
    name: NameArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    interval: IntervalOption = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="Go on for so many records.")] = None,
    json_: JsonOption = False,
) -> None:
    """Print what a device measures: heat, power, load, memory, engine, governor.

    What it does not have is a dash. In a pipe, --watch prints one line per record; with --json each line is
    the record in protobuf-JSON, with the names of telemetry.proto.

    \b
    edgellm device telemetry jetson-01
    edgellm device telemetry jetson-01 --watch --interval 5
    edgellm device telemetry jetson-01 --count 60 --json > minute.jsonl
    """
    from edgellm.cli import live

    live.quiet_grpc()
    many = watch or count is not None
    with _printer(name, many=many, as_json=json_) as put:
        live.run_until_interrupted(_telemetry(name, interval, count if many else 1, put))


async def _telemetry(
    name: str, interval_s: float, count: int | None, put: Callable[[Telemetry], None]
) -> None:
    from edgellm.cli import watching
    from edgellm.client import AsyncClient
    from edgellm.errors import DeviceUnreachableError

    left = count
    async with AsyncClient.for_device(name) as client:
        async for record in watching.records(client, interval_s, watching.ANSWER_S):
            put(record)
            left = None if left is None else left - 1
            if left == 0:
                return
        raise DeviceUnreachableError(
            f"the agent at {client.target} has stopped", "see with `edgellm device info` if it is back"
        )


@contextmanager
def _printer(name: str, *, many: bool, as_json: bool) -> Iterator[Callable[[Telemetry], None]]:
    """What prints a record: JSON, a table that is renewed in its place, a line of a table, or a table."""
    from edgellm.cli import readings

    if as_json:
        yield lambda record: print_json(to_fields(record))
    elif many and sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False) as picture:
            yield lambda record: picture.update(Text("\n".join(readings.lines(name, record))), refresh=True)
    elif many:
        line = "  ".join(f"{{:<{width}}}" for width in (8, 8, 8, 8, 7, 5, 8, 7, 6))
        typer.echo(line.format(*readings.HEADERS).rstrip())
        yield lambda record: typer.echo(line.format(*readings.row(record)).rstrip())
    else:
        yield lambda record: typer.echo("\n".join(readings.lines(name, record)))


@app.command()
def logs(
    name: NameArgument,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines to begin with.")] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")
    ] = False,
    level: Annotated[Level, typer.Option(case_sensitive=False, help="Least level.")] = Level.INFO,
    json_: JsonOption = False,
) -> None:
    """Print the last lines of a device's log, its engine's included; times are UTC.

    The agent keeps its last 2000 lines in memory. DEBUG lines are there if it runs with --verbose.

    \b
    edgellm device logs jetson-01
    edgellm device logs jetson-01 --follow --level warning
    edgellm device logs jetson-01 --lines 2000 --json | jq -r .text
    """
    from edgellm.cli import live

    live.quiet_grpc()
    live.run_until_interrupted(_logs(name, lines, level.value, follow=follow, as_json=json_))


async def _logs(name: str, lines: int, level: str, *, follow: bool, as_json: bool) -> None:
    from edgellm.cli import watching
    from edgellm.client import AsyncClient

    async with AsyncClient.for_device(name, timeout_s=_QUIET_S) as client:

        async def quiet() -> None:
            await client.info()

        found = client.watch_logs(lines, follow=follow, level=level)
        async for line in watching.attended(found, quiet, _QUIET_S, _QUIET_S):
            if as_json:
                print_json(line)
            else:
                _print_line(line)


def _print_line(line: LogLine) -> None:
    typer.echo(f"{line.time:%Y-%m-%d %H:%M:%S}.{line.time.microsecond // 1000:03d} ", nl=False)
    typer.secho(f"{printable(line.level):<7} ", fg=_LEVEL_COLORS.get(line.level), nl=False)
    typer.echo(f"{printable(line.logger)} {printable(line.text)}")


@app.command()
def whoami(name: NameArgument, json_: JsonOption = False) -> None:
    """Ask a device who we are to it, and what we may there."""
    from edgellm.client import Client

    with Client.for_device(name) as client:
        told = client.whoami()
    if json_:
        print_json(told)
    else:
        print_facts([("caller", told.caller), ("role", told.role)])


@app.command()
def audit(
    name: NameArgument,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most records.")] = 100,
    json_: JsonOption = False,
) -> None:
    """Print who changed what on a device, or was refused; times are UTC, the latest come last.

    For admins. The device checks that nothing of its log was changed since; if something was, that is said
    behind what there is.

    \b
    edgellm device audit jetson-01
    edgellm device audit jetson-01 --limit 1000 --json | jq -r 'select(.outcome != "OK")'
    """
    from edgellm.client import Client

    records: list[AuditRecord] = []
    try:
        with Client.for_device(name) as client:
            records.extend(client.audit(limit))
    finally:
        _print_audit(records, as_json=json_)


def _print_audit(records: list[AuditRecord], *, as_json: bool) -> None:
    if as_json:
        for record in records:
            print_json(record)
    elif records:
        rows = [
            (
                f"{each.time:%Y-%m-%d %H:%M:%S}",
                each.caller,
                each.role,
                each.method,
                each.subject,
                each.outcome,
            )
            for each in records
        ]
        print_table(("TIME", "CALLER", "ROLE", "METHOD", "SUBJECT", "OUTCOME"), rows)


@app.command()
def remove(name: NameArgument, json_: JsonOption = False) -> None:
    """Forget a device; nothing changes on the device itself."""
    from edgellm.devices import DeviceBook

    device = DeviceBook().remove(name)
    if json_:
        print_json(device)
    else:
        typer.echo(f"forgot {device.name}")
