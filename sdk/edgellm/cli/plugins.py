"""Commands of other packages: found by entry point, and harmless when their extra is absent."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import typer

from edgellm.errors import EdgellmError

GROUP = "edgellm.commands"
# What brings a command whose package, or a package below it, is not installed.
_EXTRAS = dict.fromkeys(("build", "profile", "quantize"), "buildhost")


def load_commands() -> dict[str, Any]:
    """All commands of other packages by name; one that cannot be loaded says why when it is called."""
    commands: dict[str, Any] = {}
    found = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    for name in sorted(_EXTRAS.keys() | found.keys()):
        commands.update(_load(name, found.get(name)))
    return commands


def _load(name: str, entry: metadata.EntryPoint | None) -> dict[str, Any]:
    if entry is None:
        return {name: _absent(name, ModuleNotFoundError("no package brings it"))}
    try:
        return dict(typer.main.get_group(entry.load()).commands)
    except Exception as error:  # noqa: BLE001 - a broken package must not take the other commands with it
        return {name: _absent(name, error)}


def _absent(name: str, cause: Exception) -> Any:
    extra = _EXTRAS.get(name)
    hint = f"pip install 'edgellm[{extra}]'" if extra else "install its package again"
    app = typer.Typer(add_completion=False)

    @app.command(
        name,
        help=f"Not installed: {hint}",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def absent() -> None:
        raise EdgellmError(f"`edgellm {name}` cannot be loaded: {cause}", hint) from cause

    return typer.main.get_command(app)
