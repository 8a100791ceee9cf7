"""`edgellm plan`: how an engine, or one that could be built from a model, would use a board's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import plan_table
from edgellm.cli.output import JsonOption, human_bytes, print_facts, print_json

if TYPE_CHECKING:
    from edgellm.bundle import Bundle, EngineConfig, Variant
    from edgellm.client import DeviceInfo
    from edgellm.fits import Board, Estimate, Fit
    from edgellm.memory import MemoryPlan

ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Bundle, Hugging Face directory, config.json, or .gguf file; default: the last build.",
        show_default=False,
    ),
]


def plan(
    model: ModelArgument = None,
    device: Annotated[list[str] | None, typer.Option(help="Ask this device; may be repeated.")] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="A board of this kind; may be repeated. Default: every board for a model, a bundle's own."
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Longest sequence, tokens.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Sequences at once.")] = None,
    json_: JsonOption = False,
) -> None:
    """Show how an engine would use a device's memory, and what a model could become before it is built.

    A model is planned from its config.json alone, at every precision: for one board its whole division, for
    several the longest context that so many sequences can have at once. Exits with 1 if nothing fits.

    \b
    edgellm plan ./Llama-3.2-1B-Instruct --context 4096 --concurrency 4
    edgellm plan config.json --profile orin-nano-8gb
    edgellm plan smollm2.bundle --profile orin-nano-8gb --context 4096 --concurrency 4
    edgellm plan --device jetson-01
    """
    devices, profiles = device or [], profile or []
    for name in devices:
        _refuse_profile_name(name)
    if model is None or _is_bundle(model):
        from edgellm.cli.bundle import open_bundle

        bundle = open_bundle(model)
        if len(devices) + len(profiles) > 1:
            _plan_bundle_on_boards(bundle, devices, profiles, context, concurrency or 1, as_json=json_)
        else:
            figures = _plan_of_bundle(bundle, devices, profiles, context, concurrency)
            print_json(figures) if json_ else print_facts(plan_facts(figures))
        return
    _plan_model(model, devices, profiles, context, concurrency or 1, as_json=json_)


def plan_facts(figures: MemoryPlan) -> list[tuple[str, str]]:
    """A memory plan for people."""
    return [
        ("available", human_bytes(figures.available_bytes)),
        ("weights", human_bytes(figures.weights_bytes)),
        ("workspace", human_bytes(figures.workspace_bytes)),
        ("headroom", human_bytes(figures.headroom_bytes)),
        (
            "KV cache",
            f"{human_bytes(figures.kv_bytes)} ({human_bytes(figures.kv_bytes_per_token)} per token)",
        ),
        ("context", f"{figures.context_tokens} tokens"),
        ("sequences", f"{figures.max_sequences} at once"),
    ]


def _is_bundle(path: Path) -> bool:
    """Whether a path was a bundle, be it damaged by now; a model has none of these names."""
    return any((path / name).exists() for name in ("oci-layout", "index.json", "blobs"))


def _refuse_profile_name(device: str) -> None:
    from edgellm.devices import DeviceBook
    from edgellm.profiles import profile_names

    if device in profile_names() and device not in {known.name for known in DeviceBook().all()}:
        raise typer.BadParameter(f"{device} is a kind of board, not a device: give it as --profile")


# One engine that was built, on one device or board: the plan that the device itself would make.


def _plan_of_bundle(
    bundle: Bundle, devices: list[str], profiles: list[str], context: int | None, concurrency: int | None
) -> MemoryPlan:
    from edgellm.memory import plan_memory

    if devices:
        return _plan_on_device(bundle, devices[0], context, concurrency)
    asked = profiles[0] if profiles else None
    config = _for_profile(bundle, asked).config
    board = _board_of(asked or config.target.profile)
    return plan_memory(
        config,
        available_bytes=board.available_bytes,
        headroom_bytes=board.headroom_bytes,
        context_tokens=context,
        max_sequences=concurrency or 1,
    )


def _plan_on_device(bundle: Bundle, name: str, context: int | None, concurrency: int | None) -> MemoryPlan:
    from edgellm.cli.bundle import variant_for
    from edgellm.client import Client
    from edgellm.memory import plan_memory

    with Client.for_device(name) as client:
        config = variant_for(bundle, client.info()).config
        figures = client.memory_plan(config)
    if context is None and concurrency is None:
        return figures
    return plan_memory(
        config,
        available_bytes=figures.available_bytes,
        headroom_bytes=figures.headroom_bytes,
        context_tokens=context,
        max_sequences=concurrency or figures.max_sequences,
    )


def _for_profile(bundle: Bundle, profile: str | None) -> Variant:
    """The variant for a profile, or the only one: a plan may ask what would be on another board."""
    return bundle.variants[0] if len(bundle.variants) == 1 else bundle.select(profile=profile)


# Boards and precisions side by side.


def _plan_bundle_on_boards(
    bundle: Bundle,
    devices: list[str],
    profiles: list[str],
    context: int | None,
    concurrency: int,
    *,
    as_json: bool,
) -> None:
    """One engine for each board: the variant that suits it."""
    from edgellm.cli.bundle import variant_for
    from edgellm.fits import Estimate, fit

    suited = [(_board_of(name), _for_profile(bundle, name).config) for name in profiles]
    suited += [_ask(name, lambda info: variant_for(bundle, info).config) for name in devices]
    found = [
        fit(board, Estimate(config.precision.weights, config), context, concurrency)
        for board, config in suited
    ]
    if as_json:
        print_json({"bundle": bundle.path, "fits": found})
    else:
        plan_table.print_engines(found)
    _fail_if_none_fits(found)


def _plan_model(
    model: Path,
    devices: list[str],
    profiles: list[str],
    context: int | None,
    concurrency: int,
    *,
    as_json: bool,
) -> None:
    """Every precision that the model could be built in, on every board that was named, or on all."""
    from edgellm.estimators import estimates
    from edgellm.fits import fit, known_boards

    columns = estimates(model)
    _refuse_too_long(columns, context)
    smallest = min((column.config for column in columns), key=lambda config: config.footprint.weights_bytes)
    boards = [_board_of(name) for name in profiles]
    boards += [_ask(name, lambda _info: smallest)[0] for name in devices]
    rows = [
        [fit(board, column, context, concurrency) for column in columns] for board in boards or known_boards()
    ]
    found = [cell for row in rows for cell in row]
    if as_json:
        print_json({"model": model, "fits": found})
    elif len(rows) == 1:
        plan_table.print_division(rows[0])
    else:
        plan_table.print_boards(rows, context)
    _fail_if_none_fits(found)


def _board_of(name: str) -> Board:
    from edgellm.fits import Board
    from edgellm.profiles import load_profile

    return Board.of(load_profile(name))


def _ask(name: str, choose: Callable[[DeviceInfo], EngineConfig]) -> tuple[Board, EngineConfig]:
    """What a device has for the engine that is chosen for it, were it the only one there.

    A device that refuses the engine says how much there is too, but not what it leaves to others.
    """
    from edgellm.client import Client
    from edgellm.errors import RemoteError
    from edgellm.fits import Board
    from edgellm.profiles import load_profile

    with Client.for_device(name) as client:
        info = client.info()
        config = choose(info)
        kind = Board.of(load_profile(info.profile))
        bandwidth = None if info.simulated else kind.bandwidth_gb_per_s
        try:
            plan = client.memory_plan(config)
        except RemoteError as error:
            if error.available_bytes is None:
                raise
            return Board(name, error.available_bytes, kind.headroom_bytes, bandwidth), config
    return Board(name, plan.available_bytes, plan.headroom_bytes, bandwidth), config


def _refuse_too_long(columns: Sequence[Estimate], context: int | None) -> None:
    from edgellm.errors import EdgellmError

    longest = columns[0].config.model.context_length
    if context is not None and context > longest:
        raise EdgellmError(
            f"--context {context} is longer than the {longest} tokens that the model can read",
            f"ask for at most {longest}",
        )


def _fail_if_none_fits(found: Sequence[Fit]) -> None:
    """What was printed says it all; scripts want an exit code."""
    from edgellm.errors import DoesNotFitError

    if any(each.fits for each in found):
        return
    nearest = min(found, key=lambda each: each.needed_bytes - each.available_bytes)
    raise DoesNotFitError(
        f"nothing fits: {nearest.engine} comes nearest and needs {nearest.needed_bytes:,} bytes on "
        f"{nearest.board}; {nearest.available_bytes:,} bytes are available",
        needed_bytes=nearest.needed_bytes,
        available_bytes=nearest.available_bytes,
        hint="ask for a shorter --context or a lower --concurrency, a smaller model or a larger board",
    )
