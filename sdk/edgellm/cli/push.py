"""Commands that bring things to devices."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgellm.cli import failures, live
from edgellm.cli.bundle import BundleArgument, open_bundle, variant_for
from edgellm.cli.output import (
    JsonOption,
    TimeoutOption,
    human_bytes,
    print_facts,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from edgellm.errors import EdgellmError
    from edgellm.push import Outcome, Rollout

app = typer.Typer(help="Bring engines to devices.", no_args_is_help=True)

_RATE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>B|kB|MB|GB|KiB|MiB|GiB)?(/s)?", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_LEAST_RATE = 16_000
_INTERRUPTED = 130
_RESUME = "run the same command again: it goes on from what the devices have"


def parse_rate(text: str) -> float:
    """Bytes per second from "5MB", "500kB/s" or "2MiB"."""
    match = _RATE.fullmatch(text.strip())
    rate = float(match["number"]) * _UNITS[(match["unit"] or "B").lower()] if match else 0.0
    if rate < _LEAST_RATE:
        raise typer.BadParameter(f"{text!r:.40}: write a rate of at least 16kB, for example 5MB or 500kB")
    return rate


DevicesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device", help="Known devices, or their addresses: a,b or given again.", show_default=False
    ),
]
GroupsOption = Annotated[
    list[str] | None,
    typer.Option("--group", help="All devices of these groups.", show_default=False),
]
RateOption = Annotated[
    Any,
    typer.Option(
        "--max-rate",
        parser=parse_rate,
        metavar="RATE",
        help="Most to send in a second, to all devices together: 5MB, 500kB.",
        show_default=False,
    ),
]


@app.callback()
def _group() -> None:
    """Keeps `engine` a command of its own, though it is the only one."""


@app.command()
def engine(
    bundle: BundleArgument = None,
    device: DevicesOption = None,
    group: GroupsOption = None,
    activate: Annotated[bool, typer.Option(help="Make it the engine that answers.")] = True,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Devices at once.")] = 4,
    streams: Annotated[int, typer.Option(min=1, max=16, help="Files at once, to each device.")] = 4,
    max_rate: RateOption = None,
    retry_for: Annotated[
        float,
        typer.Option(min=0, max=86_400, help="Seconds that a device may get no further, then it has failed."),
    ] = 60.0,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Send an engine to devices, only what is missing there, and activate it.

    Each device gets the variant of the bundle that fits it. A link that is cut is waited for, and the push
    goes on where it was cut; so does one that is started again. --timeout is for the activation. The exit
    status is 1 if any device failed; the others have the engine all the same.

    \b
    edgellm push engine --device jetson-01
    edgellm push engine smollm2.bundle --device 192.0.2.7:7400 --no-activate
    edgellm push engine --device jetson-01,jetson-02 --group line1 --max-rate 5MB
    """
    live.quiet_grpc()
    from edgellm.cli.push_progress import watching
    from edgellm.client import RateLimit
    from edgellm.push import Options, Rollout

    if not device and not group:
        raise typer.BadParameter("name devices with --device, or a group of them with --group")
    opened = open_bundle(bundle)
    names = _device_names(device or [], group or [])
    options = Options(
        jobs=jobs,
        streams=streams,
        rate=None if max_rate is None else RateLimit(max_rate),
        retry_for_s=retry_for,
        activate=activate,
        activation_timeout_s=timeout,
    )
    with watching(names, shown=not json_) as watcher:
        rollout = Rollout(opened, names, variant_for, options, watcher)
        interrupted = _run(rollout)
    outcomes = rollout.outcomes()
    if len(names) == 1 and not group:
        _tell_one(outcomes[0], as_json=json_)
    else:
        _tell_all(outcomes, as_json=json_)
    if interrupted:
        _tell_interrupted(as_json=json_)
        raise typer.Exit(_INTERRUPTED)
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def _device_names(devices: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Each device once, in the order in which they were named; raises UnknownDeviceError before any push."""
    from edgellm.devices import DeviceBook

    book = DeviceBook()
    given = [name.strip() for part in devices for name in part.split(",") if name.strip()]
    found = [book.find(name) for name in given]
    for group in (name.strip() for part in groups for name in part.split(",")):
        found += book.group(group)
    if not found:
        raise typer.BadParameter("there is no device in what was named")
    return list(dict.fromkeys(device.name for device in found))


def _run(rollout: Rollout) -> bool:
    """Whether it was interrupted."""
    interrupted = False

    async def main() -> None:
        nonlocal interrupted
        try:
            await rollout.run()
        except asyncio.CancelledError:
            interrupted = True

    live.run_until_interrupted(main())
    return interrupted


def _tell_interrupted(*, as_json: bool) -> None:
    if as_json:
        failures.report_json("Interrupted", {"hint": _RESUME})
    else:
        typer.echo(f"interrupted; what was sent stays on the devices\n  try: {_RESUME}", err=True)


def _tell_one(outcome: Outcome, *, as_json: bool) -> None:
    if outcome.error is not None:
        raise outcome.error
    if not outcome.done:
        return
    if as_json:
        print_json(_fields(outcome))
        return
    name, digest = _engine_words(outcome)
    facts = [("engine", name), ("digest", digest), ("sent", _sent_words(outcome))]
    if (plan := outcome.plan) is not None:
        granted = f"{plan.context_tokens} tokens of context, {human_bytes(plan.kv_bytes)} of KV cache"
        facts.append(("active", f"after {outcome.activation_s:.2f} s, with {granted}"))
    print_facts(facts)


def _tell_all(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    if as_json:
        print_json([_fields(outcome) for outcome in outcomes])
        return
    rows = [
        (outcome.device, _state(outcome), *_engine_words(outcome), _sent_words(outcome))
        for outcome in outcomes
    ]
    print_table(("DEVICE", "STATE", "ENGINE", "DIGEST", "SENT"), rows)
    for outcome in outcomes:
        if outcome.error is not None:
            error = failures.explained(outcome.error)
            error.message = f"{outcome.device}: {error.message}"
            failures.report(error, as_json=False)


def _state(outcome: Outcome) -> str:
    if outcome.error is not None:
        return "failed"
    if not outcome.done:
        return "interrupted"
    return "stored" if outcome.plan is None else "active"


def _engine_words(outcome: Outcome) -> tuple[str, str]:
    return ("", "") if outcome.variant is None else (outcome.variant.config.name, outcome.variant.digest)


def _sent_words(outcome: Outcome) -> str:
    pushed = outcome.pushed
    if pushed is None:
        return ""
    sent, skipped = human_bytes(pushed.sent_bytes), human_bytes(pushed.skipped_bytes)
    return f"{sent} in {pushed.elapsed_s:.2f} s; {skipped} were there already"


def _fields(outcome: Outcome) -> dict[str, object]:
    variant, pushed = outcome.variant, outcome.pushed
    return {
        "device": outcome.device,
        "state": _state(outcome),
        "name": None if variant is None else variant.config.name,
        "digest": None if variant is None else variant.digest,
        "sent_bytes": None if pushed is None else pushed.sent_bytes,
        "skipped_bytes": None if pushed is None else pushed.skipped_bytes,
        "elapsed_s": None if pushed is None else pushed.elapsed_s,
        "activated": outcome.plan is not None,
        "activation_s": outcome.activation_s,
        "plan": outcome.plan or (None if pushed is None else pushed.plan),
        "error": None if outcome.error is None else _error_fields(failures.explained(outcome.error)),
    }


def _error_fields(error: EdgellmError) -> dict[str, object]:
    told = {name: value for name, value in vars(error).items() if value not in (None, "")}
    return {"kind": type(error).__name__, **told}
