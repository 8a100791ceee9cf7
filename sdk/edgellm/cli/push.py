"""Commands that bring things to a device."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from edgellm.cli.bundle import BundleArgument, open_bundle, variant_for
from edgellm.cli.output import (
    DeviceOption,
    JsonOption,
    TimeoutOption,
    human_bytes,
    note,
    print_facts,
    print_json,
    progress,
)

app = typer.Typer(help="Bring engines to a device.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `engine` a command of its own, though it is the only one."""


@app.command()
def engine(
    device: DeviceOption,
    bundle: BundleArgument = None,
    activate: Annotated[bool, typer.Option(help="Make it the engine that answers.")] = True,
    timeout: TimeoutOption = 600.0,
    json_: JsonOption = False,
) -> None:
    """Send an engine to a device, only what is missing there, and activate it.

    A push that was cut goes on where it was cut.

    \b
    edgellm push engine --device jetson-01
    edgellm push engine smollm2.bundle --device 192.0.2.7:7400 --no-activate
    """
    from edgellm.client import Client

    opened = open_bundle(bundle)
    with Client.for_device(device) as client:
        variant = variant_for(opened, client.info())
        with progress("push", shown=not json_) as bar:
            pushed = client.push(opened, variant.digest, lambda at: bar(at.done_bytes, at.total_bytes))
        started_s = time.monotonic()
        plan = None
        if activate:
            plan = client.activate(
                pushed.digest, lambda step: note(f"{step.phase} ...", shown=not json_), timeout_s=timeout
            )
    activation_s = time.monotonic() - started_s
    if json_:
        print_json(
            {
                "name": variant.config.name,
                "digest": pushed.digest,
                "sent_bytes": pushed.sent_bytes,
                "skipped_bytes": pushed.skipped_bytes,
                "elapsed_s": pushed.elapsed_s,
                "activated": activate,
                "activation_s": activation_s if activate else None,
                "plan": plan or pushed.plan,
            }
        )
        return
    sent, skipped = human_bytes(pushed.sent_bytes), human_bytes(pushed.skipped_bytes)
    facts = [
        ("engine", variant.config.name),
        ("digest", pushed.digest),
        ("sent", f"{sent} in {pushed.elapsed_s:.2f} s; {skipped} were there already"),
    ]
    if plan is not None:
        granted = f"{plan.context_tokens} tokens of context, {human_bytes(plan.kv_bytes)} of KV cache"
        facts.append(("active", f"after {activation_s:.2f} s, with {granted}"))
    print_facts(facts)
