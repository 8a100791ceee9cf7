"""Commands about a fleet: record and show it, and say what its devices are to run."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgellm.cli.output import JsonOption, note, print_facts, print_json, print_table
from edgellm.errors import EdgellmError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgellm.fleet.desired import Assignment, Controller, Progress, Twin
    from edgellm.fleet.settings import BrokerSettings

app = typer.Typer(help="See and steer all devices of an MQTT broker.", no_args_is_help=True)

BrokerOption = Annotated[
    str | None, typer.Option("--broker", help="mqtt://HOST[:1883] or mqtts://HOST[:8883].")
]
TenantOption = Annotated[
    str | None, typer.Option(help="First level of the fleet's topics; default: default.")
]
CaOption = Annotated[Path | None, typer.Option(help="Authority that signed the broker's certificate.")]
CertOption = Annotated[Path | None, typer.Option(help="Own certificate.")]
KeyOption = Annotated[Path | None, typer.Option(help="Key of the own certificate.")]
UsernameOption = Annotated[str | None, typer.Option(help="Name at the broker.")]
PasswordOption = Annotated[Path | None, typer.Option(help="File that holds the password.")]
DbOption = Annotated[Path | None, typer.Option("--db", help="Database; default: fleet.db of this user.")]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MAX_EVENTS = 10_000


@app.command()
def connect(
    broker: Annotated[str, typer.Argument(help="mqtt://HOST[:1883] or mqtts://HOST[:8883].")],
    tenant: TenantOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    username: UsernameOption = None,
    password_file: PasswordOption = None,
    json_: JsonOption = False,
) -> None:
    """Try a broker, and keep it for the other commands.

    \b
    edgellm fleet connect mqtts://broker.example --ca ca.crt --cert me.crt --key me.key
    """
    _require_paho()
    from edgellm.fleet.desired import Controller
    from edgellm.fleet.settings import keep

    settings = _settings(locals())
    with Controller(settings) as controller:
        found = len(controller.twins())
    path = keep(settings)
    if json_:
        print_json({"broker": settings.broker, "devices": found, "settings": path})
    else:
        typer.echo(f"{settings.broker} answers and knows {found} devices; kept in {path}")


@app.command()
def watch(
    broker: BrokerOption = None,
    db: DbOption = None,
    record: Annotated[bool, typer.Option(help="Keep what comes; else only look at it.")] = True,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and end.")] = False,
    telemetry: Annotated[bool, typer.Option("--telemetry", help="Lines for telemetry, too.")] = False,
    share: Annotated[
        str | None, typer.Option(help="Share the telemetry with receivers of other databases.")
    ] = None,
    retention_days: Annotated[float, typer.Option(min=0.01, help="Of telemetry.")] = 7.0,
    event_days: Annotated[float, typer.Option(min=0.01, help="Of events.")] = 365.0,
    max_gb: Annotated[float, typer.Option(min=0.01, help="Size at which old telemetry goes.")] = 2.0,
    tenant: TenantOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    username: UsernameOption = None,
    password_file: PasswordOption = None,
    json_: JsonOption = False,
) -> None:
    """Record the fleet and show it: a live table on a terminal, else a line for each event.

    \b
    edgellm fleet watch --broker mqtt://broker.example
    edgellm fleet watch --json | jq -c 'select(.event.worker.out_of_memory)'
    """
    _require_paho()
    from edgellm.cli.fleet_watch import Watch
    from edgellm.fleet.store import Retention, default_path
    from edgellm.fleet.topics import NAME_PATTERN

    settings = _settings(locals())
    retention = Retention(retention_days, event_days, round(max_gb * 1e9))
    if share is not None and not re.fullmatch(NAME_PATTERN, share):
        raise EdgellmError(
            f"--share {share!r} cannot be part of a topic", "use letters, digits, '.', '_', '-', at most 64"
        )
    watching = Watch(settings, (db or default_path()) if record else None, retention, share)
    if once:
        watching.once()
    elif sys.stdout.isatty() and not json_ and not telemetry:
        watching.table()
    else:
        watching.lines(telemetry=telemetry, as_json=json_)


@app.command()
def status(
    device: Annotated[str | None, typer.Argument(help="Only this one, in full.")] = None,
    db: DbOption = None,
    json_: JsonOption = False,
) -> None:
    """Show the fleet as it was recorded last; asks nobody."""
    from edgellm.cli import fleet_table as looks
    from edgellm.fleet.queries import FleetReader
    from edgellm.fleet.store import default_path

    with FleetReader(db or default_path()) as reader:
        views = [reader.find(device)] if device is not None else reader.devices()
        heard_ns, counters = reader.newest_ns(), reader.counters()
        missing = reader.missing_events(views[0].topics) if device is not None else 0
    now_ns = time.time_ns()
    # Who is silent is judged by when the recording stopped, not by now.
    judged_ns = heard_ns or now_ns
    if json_:
        shown = [looks.as_json(view, judged_ns) for view in looks.worst_first(views, judged_ns)]
        print_json({"recorded_at": looks.iso(heard_ns), "counters": counters, "devices": shown})
        return
    if device is not None:
        gaps = [("missing", f"{missing} events between those that came")] if missing else []
        print_facts([*looks.facts(views[0], now_ns), *gaps])
        return
    rows = [looks.cells(view, judged_ns) for view in looks.worst_first(views, judged_ns)]
    if rows:
        print_table(looks.HEADERS, rows)
    heard = f"recorded {looks.age(now_ns - heard_ns)} ago" if heard_ns else "nothing was heard yet"
    refused = counters.get("rejected", 0)
    tail = f"; {refused} messages were rejected, see --json" if refused else ""
    typer.echo(f"{looks.summary(views, judged_ns)}; {heard}{tail}")


@app.command()
def history(
    device: Annotated[str, typer.Argument(help="Name of the device, or GROUP/NAME.")],
    kind: Annotated[Literal["events", "telemetry"], typer.Option(help="What to show.")] = "events",
    since: Annotated[str, typer.Option(help="How far back, as 90s, 30m, 24h or 7d.")] = "24h",
    db: DbOption = None,
    json_: JsonOption = False,
) -> None:
    """Show what a device told: its events, or its telemetry by the hour; with --json every single one."""
    from edgellm.cli import fleet_table as looks
    from edgellm.fleet.queries import FleetReader
    from edgellm.fleet.store import default_path

    since_ns = time.time_ns() - _duration_ns(since)
    with FleetReader(db or default_path()) as reader:
        view = reader.find(device)
        if kind == "events":
            events = reader.events(view.topics, since_ns, _MAX_EVENTS)
            if json_:
                for at_ns, event in events:
                    print_json({"received_at": looks.iso(at_ns), "event": looks.event_fields(event)})
                return
            rows = [
                (looks.clock(at_ns), looks.clock(event.time.ToNanoseconds()), looks.event_words(event))
                for at_ns, event in events
            ]
            print_table(("RECEIVED (UTC)", "DEVICE'S CLOCK", "EVENT"), rows)
        elif json_:
            for at_ns, run, sequence, name, record in reader.telemetry(view.topics, since_ns):
                fields = {
                    "run": run,
                    "sequence": sequence,
                    "part": name,
                    "record": looks.message_fields(record),
                }
                print_json({"received_at": looks.iso(at_ns), **fields})
        else:
            _print_hours(reader.hours(view.topics, since_ns))


@app.command()
def forget(
    device: Annotated[str, typer.Argument(help="Name of the device, or GROUP/NAME.")],
    db: DbOption = None,
    json_: JsonOption = False,
) -> None:
    """Remove a device and its history, as one that is gone or was installed anew; asks and tells nobody."""
    from edgellm.fleet.queries import FleetReader
    from edgellm.fleet.store import Store, default_path

    path = db or default_path()
    with FleetReader(path) as reader:
        source = reader.find(device).topics.source
    store = Store(path)
    try:
        store.forget(source)
    finally:
        store.close()
    if json_:
        print_json({"forgotten": source})
    else:
        typer.echo(f"forgot {source}")


@app.command("set-engine")
def set_engine(
    engine: Annotated[str, typer.Argument(help="Digest (sha256:...), or directory of a bundle.")],
    device: Annotated[list[str] | None, typer.Option(help="Name or GROUP/NAME; several with commas.")] = None,
    group: Annotated[str | None, typer.Option(help="All devices of this group.")] = None,
    source: Annotated[
        str, typer.Option(help="Where its files are: https://HOST/PATH or oci://HOST/REPOSITORY.")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Follow the devices until they run it.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Of --wait, seconds.")] = 600.0,
    broker: BrokerOption = None,
    tenant: TenantOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    username: UsernameOption = None,
    password_file: PasswordOption = None,
    json_: JsonOption = False,
) -> None:
    """Say which engine devices are to run; those that are away find it when they return.

    Without a source the engine must be on the device already.

    \b
    edgellm fleet set-engine sha256:... --device jetson-01,jetson-02 --source https://files.example/engines
    edgellm fleet set-engine smollm2.bundle --group line-3 --source oci://registry.example/smollm2 --wait
    """
    if (device is None) == (group is None):
        raise typer.BadParameter("give --device or --group, one of them")
    _require_paho()
    from edgellm.fleet.desired import Controller, plan

    settings = _settings(locals())
    engine_for = _engine_for(engine)
    names = [name for item in device or [] for name in item.split(",") if name]
    with Controller(settings) as controller:
        targets = _targets(controller.twins(), names, group)
        assignments = plan(targets, engine_for, source)
        controller.publish(assignments)
        outcome = _followed(controller, assignments, timeout, shown=not json_) if wait else None
    _print_outcome(assignments, outcome, as_json=json_)
    if outcome is not None and not all(item.ok for item in outcome):
        raise typer.Exit(1)


def _require_paho() -> None:
    try:
        import paho.mqtt.client  # noqa: F401
    except ModuleNotFoundError:
        raise EdgellmError(
            "MQTT needs paho-mqtt, which is not installed", "pip install 'edgellm[fleet]'"
        ) from None


def _settings(options: dict[str, Any]) -> BrokerSettings:
    from edgellm.fleet.settings import BrokerSettings, load

    return load({name: options.get(name) for name in BrokerSettings.model_fields})


def _duration_ns(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise typer.BadParameter(f"--since {text!r:.40}: write for example 90s, 30m, 24h or 7d")
    return int(match[1]) * _UNITS_S[match[2]] * 10**9


def _engine_for(engine: str) -> Callable[[Twin], str]:
    """The digest for each device: the named one, or the bundle's variant for the device's board."""
    from edgellm.bundle import Bundle

    if engine.startswith("sha256:") or not Path(engine).exists():
        return lambda _twin: engine
    bundle = Bundle.open(Path(engine))
    if len(bundle.variants) == 1:
        return lambda _twin: bundle.variants[0].digest
    return lambda twin: bundle.select(profile=twin.state.profile).digest


def _targets(twins: Sequence[Twin], names: Sequence[str], group: str | None) -> list[Twin]:
    """The named devices, or those of the group; raises EdgellmError for one that the broker does not know."""
    known = [twin for twin in twins if twin.state.session]
    if group is not None:
        found = [twin for twin in known if twin.topics.group == group]
        if not found:
            groups = ", ".join(sorted({twin.topics.group for twin in known})) or "none"
            raise EdgellmError(
                f"no device of group {group!r:.80} is known; groups: {groups}", "check --group"
            )
        return found
    return [_target(known, name) for name in dict.fromkeys(names)]


def _target(known: Sequence[Twin], name: str) -> Twin:
    found = [
        twin for twin in known if name in {twin.topics.device, f"{twin.topics.group}/{twin.topics.device}"}
    ]
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(f"{twin.topics.group}/{twin.topics.device}" for twin in found)
        raise EdgellmError(f"several devices are called {name}: {which}", "name it as GROUP/DEVICE")
    names = ", ".join(twin.topics.device for twin in known[:10]) or "none"
    raise EdgellmError(
        f"the broker knows no device {name!r:.80}; it knows: {names}",
        "a device has to connect once; check --tenant",
    )


def _followed(
    controller: Controller, assignments: Sequence[Assignment], timeout: float, *, shown: bool
) -> list[Progress]:
    seen: dict[str, str] = {}
    progress: list[Progress] = []
    for progress in controller.follow(assignments, timeout):
        for item in progress:
            words = _progress_words(item)
            if seen.get(item.topics.source) != words:
                seen[item.topics.source] = words
                note(f"{item.topics.device}: {words}", shown=shown)
    return progress


def _progress_words(item: Progress) -> str:
    from edgellm.fleet.desired import percent

    share = percent(item) if item.phase == "FETCHING" else None
    return (
        item.phase
        + (f" {share} %" if share is not None else "")
        + (f": {item.detail}" if item.detail else "")
    )


def _print_outcome(
    assignments: Sequence[Assignment], outcome: Sequence[Progress] | None, *, as_json: bool
) -> None:
    phases = [None] * len(assignments) if outcome is None else outcome
    if as_json:
        devices = [
            {
                "group": item.topics.group,
                "device": item.topics.device,
                "generation": item.desired.generation,
                "engine": item.desired.engine,
                "phase": progress.phase if progress is not None else None,
                "detail": progress.detail if progress is not None else None,
            }
            for item, progress in zip(assignments, phases, strict=True)
        ]
        print_json({"devices": devices, "ok": None if outcome is None else all(item.ok for item in outcome)})
        return
    rows = [
        (
            item.topics.device,
            item.topics.group,
            str(item.desired.generation),
            item.desired.engine,
            _progress_words(progress) if progress is not None else "set",
        )
        for item, progress in zip(assignments, phases, strict=True)
    ]
    print_table(("DEVICE", "GROUP", "GENERATION", "ENGINE", "PHASE"), rows)


def _print_hours(hours: Sequence[Any]) -> None:
    from edgellm.cli.fleet_table import hour_cells, sparkline

    headers = ("HOUR (UTC)", "RECORDS", "°C MIN/MEAN/MAX", "W MIN/MEAN/MAX", "TOK/S MIN/MEAN/MAX", "TOK/J")
    print_table(headers, [hour_cells(hour) for hour in hours])
    for name, values in (
        ("°C", [hour.celsius[2] if hour.celsius else None for hour in hours]),
        ("tok/s", [hour.tokens_per_s[1] if hour.tokens_per_s else None for hour in hours]),
    ):
        if line := sparkline(values):
            typer.echo(f"{name:<6} {line}")
